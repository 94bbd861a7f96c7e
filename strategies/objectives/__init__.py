"""What a training makes better: answers that are copied, or answers that are preferred.  Planning loads no torch here.

contract       start here: what an objective says of itself, and what it is given
documents      the loss of an objective over whole documents, in a worker
dpo            preferred over rejected answers, beside a reference: DPO and its variants of one pair
ipo            the same with a margin that is aimed at instead of grown
kto            answers marked good or bad, without pairs
orpo           supervised fine-tuning and the odds of a preferred answer in one loss, without a reference
sft            supervised fine-tuning, the default
simpo          preferred over rejected answers by their mean log-probability, without a reference
"""
