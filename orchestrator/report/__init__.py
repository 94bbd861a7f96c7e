"""Reports of runs and searches: one HTML file, or Markdown.

run           start here: a run folder -> the blocks of its report
bench         a benchmark's timeline as a picture
blocks        what a report is made of
costs         costs as a table
html          blocks -> one HTML file that needs nothing else
markdown      blocks -> Markdown, the figures as SVG files in a folder beside it
plots         figures as SVG without fonts or colours of their own
proofs        two ways to the same answer, and how far apart they were
search        a search folder -> the blocks of its report
serving       how fast a server of the run answers, and what a million tokens cost
stages        the stages of a pipeline: their numbers, and one step as a picture
tasks         public tasks: base and tuned model, and how sure the difference is
tco           what a job costs, and what it would cost on other machines
"""
