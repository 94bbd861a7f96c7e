"""What tests/first_contact.py tries on a card, a file for each kind of question.

bench.py      the card, and models trained on it        checks.py   verdicts, their table and their JSON
facts.py      which card is which, what runs on it      numbers.py  gradients, resume, divided state, lanes
costs.py      memory and time predicted and measured    limits.py   a full card, fp16's loss scale
whole.py      the quick start, two workers together
"""
