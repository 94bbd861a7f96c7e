"""What a training makes better: answers that are copied, or answers that are preferred.  Planning loads no torch here.

contract       start here: what an objective says of itself, and what it is given
documents      the loss of an objective over whole documents, in a worker
dpo            preferred over rejected answers, beside a reference: DPO and its variants of one pair
ipo            the same with a margin that is aimed at instead of grown
kto            answers marked good or bad, without pairs
losses         the loss of whichever objective over whole documents
orpo           supervised fine-tuning and the odds of a preferred answer in one loss, without a reference
reward         a score of whole documents, higher for the better answer of a pair
scores         the loss of an objective over the scores of whole documents, in a worker
sft            supervised fine-tuning, the default
simpo          preferred over rejected answers by their mean log-probability, without a reference
totals         what documents were worth to an objective, added up over micro-batches and workers
"""
