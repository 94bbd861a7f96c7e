"""Whether a chat template writes each turn by itself, and where each begins in the text.

Most templates write something before the first turn, then one turn after the other, and the generation prompt behind
them.  Of such a one the text of the first turns is the beginning of the text of all: it need not be rendered again.
That this holds for every conversation is read from the template itself, not from examples of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Render = Callable[[list[dict[str, Any]], bool], str]
_OF_THE_LOOP = {"first", "index", "index0"}  # what does not depend on later turns
_PURE_CALLS = {"raise_exception"}
_TOKENS = {"bos_token", "eos_token", "pad_token", "unk_token"}  # nothing where the tokenizer has none
_FILTERS = {"trim", "upper", "lower", "capitalize", "title", "string", "length", "tojson", "replace", "first"}


def endings(source: str, constants: set[str]) -> tuple[str, str] | None:
    """What a template writes behind its turns, and what where an answer is generated, if it writes turn by turn.

    `constants` are names with the same text in each call.  None where the template is of another kind or cannot be
    read: one expression that is not known to depend on its own turn alone makes it one.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        body = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).parse(source).body
    except TemplateError:  # it has blocks of transformers' own
        return None
    loops = [at for at, node in enumerate(body) if isinstance(node, nodes.For)]
    if len(loops) != 1:
        return None
    known: set[str] = constants | _TOKENS
    loop: Any = body[loops[0]]
    for node in body[: loops[0]]:
        if not _depends_on(node, known, of_loop=False):
            return None
        known |= _names_set(node)
    if not isinstance(loop.target, nodes.Name) or loop.test or loop.else_ or loop.recursive:
        return None
    own = {loop.target.name}.union(*map(_names_set, loop.body))
    if own & known or not _is_named(loop.iter, "messages"):  # a name with two meanings; other turns than those given
        return None
    if {"messages", "loop", "add_generation_prompt"} & (own | known) or not _all(loop.body, own | known, of_loop=True):
        return None
    behind = body[loops[0] + 1 :]
    found = _constant(behind, is_prompted=False), _constant(behind, is_prompted=True)
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _constant(parts: Iterable[Any], is_prompted: bool) -> str | None:
    """What nodes write, where they write the same for all conversations."""
    from jinja2 import nodes

    text = ""
    for part in parts:
        if isinstance(part, nodes.Output):
            found = _constant(part.nodes, is_prompted)
        elif isinstance(part, nodes.TemplateData):
            found = part.data
        elif isinstance(part, nodes.If) and not part.elif_ and _is_named(part.test, "add_generation_prompt"):
            found = _constant(part.body if is_prompted else part.else_, is_prompted)
        else:
            found = part.value if isinstance(part, nodes.Const) and isinstance(part.value, str) else None
        if found is None:
            return None
        text += found
    return text


def _names_set(node: Any) -> set[str]:
    """Names that a node sets."""
    from jinja2 import nodes

    found = [node, *node.find_all(nodes.Assign)] if isinstance(node, nodes.Assign) else node.find_all(nodes.Assign)
    return {one.target.name for one in found if isinstance(one.target, nodes.Name)}


def _depends_on(node: Any, known: set[str], of_loop: bool) -> bool:
    """Whether a node writes the same wherever these names, the first turn and what came before are the same."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        return node.name in known
    if isinstance(node, nodes.Getitem) and _is_named(node.node, "messages"):
        return isinstance(node.arg, nodes.Const) and node.arg.value == 0
    if isinstance(node, nodes.Getattr) and _is_named(node.node, "loop"):
        return of_loop and node.attr in _OF_THE_LOOP
    if isinstance(node, nodes.Assign):
        return isinstance(node.target, nodes.Name) and _depends_on(node.node, known, of_loop)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
        return node.node.name in _PURE_CALLS and _all(_arguments(node), known, of_loop)
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        return False
    written = (nodes.Output, nodes.TemplateData, nodes.Const, nodes.If, nodes.CondExpr, nodes.Add, nodes.Concat)
    compared = (nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Test, nodes.Mod)
    read = (nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.List, nodes.Tuple, nodes.Call, nodes.Filter)
    return isinstance(node, (*written, *compared, *read)) and _all(node.iter_child_nodes(), known, of_loop)


def _arguments(call: Any) -> Iterator[Any]:
    yield from call.args
    yield from (pair.value for pair in call.kwargs)
    yield from (one for one in (call.dyn_args, call.dyn_kwargs) if one is not None)


def _all(parts: Iterable[Any], known: set[str], of_loop: bool) -> bool:
    return all(_depends_on(part, known, of_loop) for part in parts)


def _is_named(node: Any, name: str) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name == name


class Turns(list[Any]):
    """Turns that note how much a template has written where it begins each of them."""

    def __init__(self, turns: Iterable[Any]) -> None:
        super().__init__(turns)
        self.written = 0  # characters, counted by who collects them
        self.begins: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        self.begins.clear()
        for turn in super().__iter__():
            self.begins.append(self.written)
            yield turn


def compile_template(tokenizer: Any, source: str) -> Render | None:
    """The compiled template itself, as `apply_chat_template` fills it for turns of text alone.

    None where it does not write the same, or this version of transformers does not show it.
    """
    try:
        from transformers import PreTrainedTokenizerBase
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        template = _compile_jinja_template(source)
        # As `Template.render`, which gathers the same globals anew each time.
        names = {**template.globals, "tools": None, "documents": None, **tokenizer.special_tokens_map}
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

        def render(turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
            given = {**names, "messages": turns, "add_generation_prompt": add_generation_prompt}
            parts = template.root_render_func(template.new_context(given, shared=True))
            return "".join(_count(parts, turns) if isinstance(turns, Turns) else parts)

        usual = tokenizer.apply_chat_template(probe, chat_template=source, tokenize=False)
        return render if render(probe, False) == usual else None
    except Exception:  # whatever it is, it is met again on the usual way, which says so
        return None


def _count(parts: Iterable[str], turns: Turns) -> Iterator[str]:
    """What a template writes, counted for the turns that it reads meanwhile."""
    turns.written = 0
    for part in parts:
        turns.written += len(part)
        yield part


def endings_of(render: Render, source: str, constants: set[str]) -> tuple[str, str] | None:
    """`endings`, where a conversation shows them as well."""
    found = endings(source, constants)
    if found is None:
        return None
    probe = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    try:
        text = render(turns := Turns(probe), False)
        agree = [
            render(probe[:count], prompted) == text[: turns.begins[count]] + found[prompted]
            for count in (1, 3)
            for prompted in (False, True)
        ]
    except Exception:  # it refuses such a conversation
        return None
    return found if all(agree) else None
