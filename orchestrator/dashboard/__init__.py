"""A read-only page about the runs of a folder and the machines of a cluster, live by server-sent events.

site       start here: the routes, who may ask, and the two streams
server     answers at an address until it is asked to end
board      the runs of the folder as rows: what changed since a moment
run_page   what the page shows of one run
verbs      what other verbs of this program say, asked in processes of their own
words      the page's texts in the reader's language
page.html page.css page.js chart.js    what the browser gets; nothing else is loaded
"""
