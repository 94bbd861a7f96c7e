"""What a run or a search came to, for somebody who was not there: one HTML file, or Markdown.  Only the CLI imports it.

blocks.py    what a report is made of
of_run.py, of_search.py    run folder or search folder -> blocks
plots.py     figures as SVG (the only module that knows matplotlib)
tco.py       what it cost, and what other machines would
html.py, markdown.py    blocks -> a file
words.py     English and Japanese
"""
