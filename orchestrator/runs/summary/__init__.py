"""What readers of a run need of its events, kept beside them: a run of a million steps is read once.

summary_file   start here: brings a run's summary up to date by what was appended since, and keeps it
event_summary  what is remembered of events, event by event
curves         a curve of bounded size that keeps every peak, and a set of steps
pace           how fast a run trains by the clock
time_left      how long a run still takes, by its own steps or by the plan
follow         a summary in memory that grows with the events of a live run
lines          the events of a file, line by line
facts          the row of a run in a table, kept while no file it rests on changes
"""
