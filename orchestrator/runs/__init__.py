"""What a run or a search leaves on disk, and what of it may be trusted.

run_folder       start here: the files of one run
checkpoints      which checkpoints of a run are whole, found without torch, and which is handed back
condition        whether a run is whole and finished, and what is wrong with it
digests          SHA-256 of model files and of what is handed back
events           every kind of line in events.jsonl as a dataclass
json_files       the JSON files of a run folder, each parsed in one place
locks            who holds a folder
markdown         text of a user, a model or a library inside a Markdown page
phases           seconds that a run spent in each phase
model_card       the model card that goes with what a run hands back
record           what a folder was begun with
recorded_folder  a folder whose deciding files are recorded
search_folder    the files of a search
stage_spans      when the stages of a pipeline computed in one step
worker_stats     each worker's pace, waiting time, memory and traffic
summary          what readers need of a run's events, kept beside them
proofs           two ways to the same answer, compared: the table of a run
tasks            scores of public tasks, before and after training
comparison       how sure a difference between two evaluations is
mirror           trackers as mirrors of run folders
"""
