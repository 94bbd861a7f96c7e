"""How a job lives: prepared, run, recovered, finished; and what can be asked before it starts.

run               start here: the whole path of a job in one file
baseline_helper   the machine that a plan leaves out, at work beside the others
calibration       predicted against measured, over finished runs -> better predictions for the same device and numbe
finish            the end of a run
inspect_data      rows as the model will see them, and what packing makes of them
machines          where a plan's machines come from
recovery          what happens when machines are lost, return or join
technique_report  every technique on every device
trace_check       `plan --trace`
validate          a job checked without starting it
verify            what a run may rely on when it goes on
"""
