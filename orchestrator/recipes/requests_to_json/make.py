"""Data of the quick start: an office desk's inbox, each request turned into one line of JSON.

A small company's office desk gets short messages: book a room, order supplies, a fault in the
building, leave.  The model reads one message and answers with one line of strict JSON that a
booking system can act on: fixed keys per action, canonical values ("2 pm" is "14:00", "Tue" is
"tuesday", "the wifi keeps dropping" is a fault of the "network", "vacation" is "holiday").
The prompt does not list the keys, so a model that was not trained on the task cannot know them.

    python orchestrator/recipes/requests_to_json/make.py

writes train.jsonl and eval.jsonl next to this file, and the same requests with their action as a
label (train_labels.csv, eval_labels.csv); the same bytes each time (seeded, standard library only).
All content is invented.

What keeps the evaluation honest:
* every tuple of slot values (such as: room, day, time and people) belongs to one side only, so no
  answer of eval.jsonl is the answer of a training row;
* every second eval row is also worded by a sentence that training never saw (HELD_OUT below);
* the script stops if a user text or an answer of eval.jsonl occurs in train.jsonl.
"""

import csv
import itertools
import json
import random
from pathlib import Path
from typing import Any

SEED = 11
SYSTEM = "Turn the request into JSON."  # short on purpose: the model's default system text is longer
TRAIN_ROWS = {"book_room": 300, "order_supplies": 160, "report_fault": 180, "request_leave": 160}
EVAL_ROWS = 20  # of each action
EVAL_SHARE = 0.15  # of the slot tuples of each action, kept out of training


# ---- slots: canonical value -> the ways people write it -------------------------------------
def plain(text: str) -> dict[str, list[str]]:
    return {value: [value] for value in text.split(", ")}


def clock(hour: int, minute: int) -> list[str]:
    if minute:
        return [f"{hour}:{minute}"]
    return [f"{hour}:00", f"{(hour - 1) % 12 + 1} {'am' if hour < 12 else 'pm'}"]


WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
COUNTS = {n: [str(n), str(n), word] for n, word in enumerate(WORDS, start=2)}
DAYS = plain("monday, tuesday, wednesday, thursday, friday")
DAYS = {d: [d.capitalize(), d.capitalize(), d, d[:3].capitalize()] for d in DAYS}
TIMES = {f"{h:02d}:{m:02d}": clock(h, m) for h in range(9, 17) for m in (0, 30)}
ROOMS = plain("Cedar, Maple, Birch, Willow, Juniper, Aspen, Rowan, Hazel")
TEAMS = plain("sales, design, finance, support, legal, warehouse, marketing")
ITEMS = plain(
    "headsets, sticky notes, whiteboard markers, desk lamps, notebooks, toner cartridges, envelopes, keyboards, "
    "phone chargers, monitor stands, paper towels, coffee filters"
)
FLOORS = {0: ["on the ground floor"], 1: ["on the first floor", "on floor 1"], 2: ["on the second floor", "on floor 2"]}
FLOORS |= {3: ["on the third floor", "on floor 3"], 4: ["on the fourth floor", "on floor 4"]}
DEVICES = {
    "printer": ["the printer is jammed", "the printer only prints blank pages", "our printer is offline"],
    "projector": ["the projector shows no picture", "the projector is flickering", "the beamer stays dark"],
    "network": ["the wifi keeps dropping", "the internet is down", "the network is very slow"],
    "heating": ["the radiators are cold", "the heating is off", "the heating makes odd noises"],
    "door": ["the door does not lock", "the door is stuck", "the door badge reader is dead"],
    "lights": ["the lights keep blinking", "a lamp is broken", "the lights are out"],
    "coffee machine": ["the coffee machine leaks", "the espresso machine is dead", "the coffee machine is broken"],
    "elevator": ["the elevator is stuck", "the elevator doors do not close", "the lift does not move"],
}
URGENT = {
    True: ["This is urgent.", "Very urgent!", "We need it fixed right now.", "This is an emergency."],
    False: ["No rush.", "Not urgent.", "No hurry at all.", "It can wait."],
}
KINDS = {
    "holiday": ["holiday", "vacation", "annual leave"],
    "sick": ["sick leave"],
    "parental": ["parental leave"],
    "unpaid": ["unpaid leave"],
    "training": ["training leave"],
}

# ---- actions: key -> slot; then the sentences -----------------------------------------------
ACTIONS: dict[str, dict[str, dict[Any, list[str]]]] = {
    "book_room": {"room": ROOMS, "day": DAYS, "time": TIMES, "people": COUNTS},
    "order_supplies": {"item": ITEMS, "quantity": COUNTS, "team": TEAMS},
    "report_fault": {"device": DEVICES, "floor": FLOORS, "urgent": URGENT},
    "request_leave": {"kind": KINDS, "from": DAYS, "to": DAYS, "team": TEAMS},
}
SENTENCES = {
    "book_room": [
        "Can I get {room} on {day} at {time} for {people} people?",
        "Please book the {room} room for {people}, {day} {time}.",
        "We are {people} and need {room} {day} at {time}.",
        "Meeting of {people} people on {day}, {time}. Is {room} free?",
        "{day} {time}, room {room}, {people} of us please.",
        "Hi, reserve {room} for {day}. We start at {time} with {people} people.",
        "Could you block {room} at {time} on {day}? There will be {people} of us.",
        "Need a place for {people} people at {time} {day}, ideally {room}.",
        "I have a client call in {room} on {day}, {people} people, from {time}.",
    ],
    "order_supplies": [
        "The {team} team needs {quantity} {item}.",
        "Please order {quantity} {item} for {team}.",
        "Could you get us {quantity} {item}? We are the {team} team.",
        "{team} here, we ran out of {item}. Send {quantity} please.",
        "We are short of {item} in {team}, {quantity} would do.",
        "Can {team} have {quantity} more {item}?",
        "Order for {team}: {quantity} {item}.",
        "I would like {quantity} {item} delivered to the {team} desk.",
    ],
    "report_fault": [
        "Hello, {device} {floor}. {urgent}",
        "{floor} {device}. {urgent}",
        "{urgent} I think {device} {floor}.",
        "Just to let you know that {device} {floor}. {urgent}",
        "Someone should look at this: {device} {floor}. {urgent}",
        "Again {device} {floor}! {urgent}",
        "{urgent} It seems that {floor} {device}.",
        "Can you send somebody? It seems {device} {floor}. {urgent}",
    ],
    "request_leave": [
        "I would like to take {kind} from {from} to {to}. I work in {team}.",
        "{kind} please, {from} until {to}, {team} team.",
        "I am in {team} and need {kind} {from} to {to}.",
        "Can I have {kind} from {from} through {to}? My team, {team}, knows about it.",
        "Please put me down for {kind}, {from} - {to}. Team: {team}.",
        "{team} here. I am away on {kind} from {from} till {to}.",
        "From {from} to {to} I will be on {kind}, my team is {team}.",
        "Requesting {kind} for {from} to {to}, {team} department.",
    ],
}
HELD_OUT = {
    "book_room": [
        "Is {room} available {day} at {time}? We would be {people} people.",
        "I want to hold a workshop in {room} with {people} people, {day} from {time}.",
        "Room request: {room}, {people} people, {time} on {day}.",
    ],
    "order_supplies": [
        "Hi, {quantity} {item} for the {team} team, thanks.",
        "{team} is asking for {quantity} new {item}.",
        "Could we please receive {quantity} {item} in the {team} office?",
    ],
    "report_fault": [
        "Good morning, {floor} {device}. {urgent}",
        "I noticed that {device} {floor}. {urgent}",
        "{urgent} Please check, {device} {floor}.",
    ],
    "request_leave": [
        "May I go on {kind} between {from} and {to}? I belong to {team}.",
        "Leave request, {team} team: {kind}, {from} to {to}.",
        "I plan to be on {kind}, starting {from} and ending {to}, {team} team.",
    ],
}


def answers(action: str) -> list[dict[str, Any]]:
    """Every answer of an action, in a fixed shuffled order: the first ones are for the evaluation."""
    slots, days = ACTIONS[action], list(DAYS)
    every = [dict(zip(slots, values, strict=True)) for values in itertools.product(*slots.values())]
    if action == "request_leave":
        every = [a for a in every if days.index(a["from"]) < days.index(a["to"])]
    random.Random(f"{SEED} {action}").shuffle(every)
    return every


def row(rng: random.Random, action: str, answer: dict[str, Any], sentence: str) -> list[dict[str, str]]:
    text = sentence.format(**{key: rng.choice(ACTIONS[action][key][value]) for key, value in answer.items()})
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": text[0].upper() + text[1:]},
        {"role": "assistant", "content": json.dumps({"action": action, **answer})},
    ]


def rows() -> tuple[list, list]:
    rng, train, held = random.Random(SEED), [], []
    for action in ACTIONS:
        every, sentences = answers(action), SENTENCES[action]
        cut = max(EVAL_ROWS, int(len(every) * EVAL_SHARE))
        for n in range(EVAL_ROWS):
            pool = HELD_OUT[action] if n % 2 else sentences
            held.append(row(rng, action, every[n % cut], pool[n // 2 % len(pool)]))
        for n in range(TRAIN_ROWS[action]):
            train.append(row(rng, action, every[cut + n % (len(every) - cut)], rng.choice(sentences)))
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


def main() -> None:
    train, held = rows()
    for part in (1, 2):  # user texts, answers
        assert not {r[part]["content"].lower() for r in train} & {r[part]["content"].lower() for r in held}
    for name, part in (("train", train), ("eval", held)):
        path = Path(__file__).with_name(f"{name}.jsonl")
        path.write_text("".join(json.dumps({"messages": r}) + "\n" for r in part), encoding="utf-8")
        print(path.name, len(part), "rows")
        with path.with_name(f"{name}_labels.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["text", "label"])
            for _, user, assistant in part:
                writer.writerow([user["content"], json.loads(assistant["content"])["action"].replace("_", " ")])


if __name__ == "__main__":
    main()
