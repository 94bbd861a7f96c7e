"""The verbs of machines: doctor, probe, techniques, and of one's own cluster: head, join, nodes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clusters.capability import NodeCapability
from clusters.safe.reading import name_mistake, printable
from clusters.units import format_bytes
from orchestrator.cli.options import (
    HardwareOption,
    JsonOption,
    RefreshOption,
    SetOption,
    complete_job,
    load_job,
    out,
    print_json,
    say,
    show,
)
from orchestrator.errors import ClusterError, JobError
from orchestrator.language.catalogue import tr
from orchestrator.language.help import fill
from orchestrator.views.screen import new_table

if TYPE_CHECKING:
    from clusters.ray.spares import Spares

InterfaceOption = Annotated[
    str | None, typer.Option("--interface", help="the network interface to the other machines, e.g. eth0")
]
AddressOption = Annotated[str | None, typer.Option("--address", help="or the address of this machine on it")]
NameOption = Annotated[str | None, typer.Option("--name", help="the machine's name in plans; default: its host name")]
SlotsOption = Annotated[
    int | None, typer.Option("--slots", min=0, help="devices that may train; default: every GPU, else the CPU")
]
TokenOption = Annotated[Path | None, typer.Option("--token-file", help="default: ~/.ray/auth_token")]


verbs = typer.Typer()


@verbs.command()
def doctor(json_: JsonOption = False) -> None:
    """Show what is installed on this machine, what each missing piece would bring, and the line to type.

    Example: orchestrator doctor
    """
    from orchestrator.doctor.checks import all_checks

    found = all_checks(Path.cwd())
    if json_:
        print_json([vars(one) for one in found])
        return
    marks = {"ok": "ok     ", "absent": "-      ", "attention": "LOOK   "}
    for one in found:
        missing = f"; would bring {one.brings}" if one.brings else ""
        line = f"{marks[one.state]}{tr(one.name)}: {tr(f'{one.found}{missing}')}"
        show(fill(line, out.width, 9))
        if one.fix:
            show(f"         {one.fix}")


@verbs.command()
def probe(
    cluster: Annotated[str, typer.Option(help="local, or the address of a Ray cluster")] = "local",
    hardware: HardwareOption = None,
    refresh: RefreshOption = False,
    json_: JsonOption = False,
) -> None:
    """Show what the machines can do: memory, FLOP/s by number format, bandwidths, links; measured once, then cached.

    Examples: orchestrator probe
              orchestrator probe --cluster head:6379 --refresh
              orchestrator probe --hardware home-lab
    """
    from orchestrator.lifecycle import machines
    from orchestrator.views.machines import machines_view

    found = machines.declared(hardware) if hardware else machines.probe(cluster, say, refresh)
    if json_:
        print_json(found.as_dict())
    else:
        out.print(machines_view(found))


@verbs.command()
def techniques(
    job: Annotated[
        str | None, typer.Argument(help="judge for this job's model and data", autocompletion=complete_job)
    ] = None,
    hardware: HardwareOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="try each on a small model here, some minutes")] = False,
    set_: SetOption = [],
    refresh: RefreshOption = False,
    json_: JsonOption = False,
) -> None:
    """Show what each optimization does on each device: effective, works, little gain, harmful or impossible, and why.

    Examples: orchestrator techniques
              orchestrator techniques job.yaml --hardware home-lab
              orchestrator techniques --measure
    """
    from orchestrator.lifecycle import machines
    from orchestrator.lifecycle.technique_report import catalogue
    from orchestrator.views.techniques import catalogue_view, measured_view

    if measure and hardware:
        raise JobError(
            f"--measure tries techniques on this machine, and --hardware {hardware} declares others; leave one of them"
            " out"
        )
    loaded = load_job(job, set_) if job else None  # before anything is measured
    cluster = machines.declared(hardware) if hardware else machines.probe("local", say, refresh)
    rows = catalogue(cluster, loaded, measure, say)
    if json_:
        print_json(rows)
    else:
        out.print(measured_view(rows) if measure else catalogue_view(rows))


@verbs.command()
def head(
    interface: InterfaceOption = None,
    address: AddressOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="where the others join")] = 6379,
    name: NameOption = None,
    slots: SlotsOption = None,
    token_file: TokenOption = None,
    dashboard_port: Annotated[
        int | None,
        typer.Option(
            "--dashboard-port", min=1, max=65535, help="take jobs over HTTP here: submit --cluster http://HOST:PORT"
        ),
    ] = None,
    spares: Annotated[
        int,
        typer.Option(
            "--spares",
            min=0,
            max=64,
            help="processes that wait, libraries loaded, for jobs of this machine; about 0.6 GiB each",
        ),
    ] = 1,
) -> None:
    """Make this machine the head of a cluster, and stay until Ctrl-C.  Only machines with its token can join.

    Ray listens on every interface; the token keeps others out, and a firewall can close what the machines do not need.
    Jobs of this user that name no cluster then start in it, on this machine alone: `submit` says so.

    Examples: orchestrator head --interface eth0
              orchestrator head --address 192.168.1.10 --slots 0
    """
    from clusters.probe.machine import look_at_this_node
    from clusters.ray import node_daemon as daemon

    _refuse_mistakes(interface, address, name)
    try:
        own_address = _own_address(interface, address)
        daemon.check_port(port, "--port")
        if dashboard_port is not None:
            daemon.check_port(dashboard_port, "--dashboard-port")
        token = daemon.token_file(token_file, make=True)
        capability = look_at_this_node()
        count = _count_slots(slots, capability)
        name = name or socket.gethostname()
        waiting = _spares(spares if count else 0, capability)
        own = daemon.OwnNode(name, own_address, None, token, count, port, dashboard_port=dashboard_port, spares=waiting)
        say(f"the cluster's token is in {token}; copy it to ~/.ray/auth_token of each machine that joins, then there:")
        say(f"    orchestrator join {own_address}:{port}")
        say(f"a job runs here with cluster: {{address: '{own_address}:{port}'}}")
        if dashboard_port:
            say(f"or from anywhere: orchestrator submit job.yaml --cluster http://{own_address}:{dashboard_port}")
        daemon.keep_running(own, capability, say)
    except daemon.CannotServe as error:
        raise ClusterError(str(error)) from None


@verbs.command()
def join(
    head: Annotated[str, typer.Argument(help="HOST or HOST:PORT of the head")],
    interface: InterfaceOption = None,
    address: AddressOption = None,
    name: NameOption = None,
    slots: SlotsOption = None,
    token_file: TokenOption = None,
) -> None:
    """Give this machine's devices to a head's cluster, and stay until Ctrl-C; rejoins after any interruption.

    Example: orchestrator join 192.168.1.10
    """
    from clusters.probe.machine import look_at_this_node
    from clusters.ray import node_daemon as daemon

    _refuse_mistakes(interface, address, name)
    host, port = _host_and_port(head, daemon.PORT)
    try:
        own_address = _own_address(interface, address, host)
        token = daemon.token_file(token_file, make=False)
        capability = look_at_this_node()
        count = _count_slots(slots, capability)
        own = daemon.OwnNode(name or socket.gethostname(), own_address, f"{host}:{port}", token, count)
        daemon.keep_running(own, capability, say)
    except daemon.CannotServe as error:
        raise ClusterError(str(error)) from None


@verbs.command()
def nodes(
    cluster: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Ray cluster; default: the one of this machine")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show the machines of a cluster, what each can do and what it does now.

    Example: orchestrator nodes --cluster 192.168.1.10:6379
    """
    from clusters.ray.connect import CannotConnect, RefusesToken, connect
    from clusters.ray.nodes import inventory

    where = cluster or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        with connect(where, num_slots=1, cores_per_slot=1):
            found = _latest(inventory())
    except RefusesToken as error:
        raise ClusterError(str(error)) from None
    except CannotConnect as error:
        raise ClusterError(f"{error}. Start one with `orchestrator head`, or name one with --cluster") from None
    if json_:
        print_json(found)
        return
    table = new_table(
        "node",
        "address",
        "state",
        "cores",
        "memory",
        "device",
        "slots",
        "does",
        fold=True,
        dispensable=("address", "cores"),
    )
    for node in found:
        table.add_row(
            node["name"],
            node["address"],
            node["state"],
            f"{node['num_cores']:g}",
            format_bytes(node["memory_bytes"]) if node["memory_bytes"] else "-",
            node["device"],
            tr("{0} of {1} in use").format(f"{node['slots_in_use']:g}", f"{node['slots']:g}"),
            ", ".join(map(tr, node["does"])) or "-",
        )
    out.print(table)


def _latest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per name: Ray lists every earlier life of a node that came back as a dead one."""
    by_name = {node["name"]: node for node in sorted(found, key=lambda node: node["state"] == "alive")}
    return [by_name[name] for name in sorted(by_name)]


def _refuse_mistakes(interface: str | None, address: str | None, name: str | None) -> None:
    if interface and address:
        raise JobError("--interface and --address both name this machine's address: give one of them")
    for option, text in (("--interface", interface), ("--address", address)):
        if text is not None and not (text.isascii() and text.isprintable() and 0 < len(text) <= 253):
            raise JobError(f"{option} {printable(text[:80])!r}: is not an interface name or an IP address")
    if name is not None and (wrong := name_mistake(name)):
        raise JobError(f"--name {wrong}")


def _host_and_port(head: str, default_port: int) -> tuple[str, int]:
    """Parse HOST or HOST:PORT.  Raises JobError: connecting to what is not an address would be retried without end."""
    host, _, port = head.partition(":")
    if not host or (":" in head and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise JobError(f"{head!r} is not HOST or HOST:PORT, for example 192.168.1.10:{default_port}")
    return host, int(port or default_port)


def _own_address(interface: str | None, address: str | None, *peer: str) -> str:
    """This machine's address, checked: the stated one, or the one that leads to `peer`.  Raises CannotServe."""
    from clusters.ray.node_daemon import address_of, address_towards, check_address

    found = address_of(interface) if interface else address or address_towards(*peer)
    check_address(found)
    return found


def _spares(count: int, capability: NodeCapability) -> Spares | None:
    """Processes that wait for jobs of this machine, with the environment in which those are started."""
    from clusters.ray.spares import Spares, free_port
    from strategies.step import host_memory

    return Spares(count, {} if capability.gpus else host_memory.process_environment(), free_port()) if count else None


def _count_slots(stated: int | None, capability: NodeCapability) -> int:
    return len(capability.gpus) or 1 if stated is None else stated
