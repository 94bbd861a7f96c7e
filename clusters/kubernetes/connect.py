"""The connection to a Kubernetes API server: the official client, its configuration, commands in a pod.

The only module that loads `kubernetes`, and only when a job goes there.  https://github.com/kubernetes-client/python
"""

from __future__ import annotations

import os
from typing import Any

from clusters.job_backend import JobLost, VerbFailed
from clusters.ray.connect import CannotConnect

_CHUNK_BYTES = 256 * 1024


def load_kubernetes() -> Any:
    """The client, whose modules know no types."""
    import kubernetes.client
    import kubernetes.config
    import kubernetes.stream
    import kubernetes.watch

    return kubernetes


def open_client(kube: Any, context: str | None, namespace: str | None) -> tuple[Any, str, str]:
    """The client of a context of the kubeconfig (or of the pod this runs in), its namespace, the context's name.

    Raises CannotConnect.
    """
    fresh = kube.client.Configuration()  # the default copy may keep old credentials
    fresh.retries = False  # KubeClient tries again itself, and knows what is safe to repeat
    file = os.environ.get("KUBECONFIG")  # the client reads it once for a whole process
    try:
        contexts, active = kube.config.list_kube_config_contexts(file)
    except kube.config.ConfigException as error:
        return _client_in_a_pod(kube, fresh, error), namespace or "default", "in-cluster"
    names = [str(one["name"]) for one in contexts]
    if context and context not in names:
        raise CannotConnect(f"there is no context {context!r} in your kubeconfig; there are {', '.join(names)}")
    chosen = next(one for one in contexts if one["name"] == (context or active["name"]))
    try:
        api = kube.config.new_client_from_config(
            config_file=file, context=chosen["name"], client_configuration=fresh, persist_config=False
        )
    except Exception as error:  # ConfigException, or whatever a login helper of a cloud raises
        raise CannotConnect(f"the context {chosen['name']!r} of your kubeconfig cannot be used: {error}") from error
    return api, namespace or chosen["context"].get("namespace") or "default", str(chosen["name"])


def _client_in_a_pod(kube: Any, fresh: Any, error: Exception) -> Any:
    try:
        kube.config.load_incluster_config(client_configuration=fresh)
    except kube.config.ConfigException:
        raise CannotConnect(
            f"no Kubernetes cluster is known here ({error}): put its kubeconfig at ~/.kube/config, or name it in"
            " KUBECONFIG"
        ) from error
    return kube.client.ApiClient(fresh)


def talk(line: Any, pod: str, command: list[str], stdin: bytes) -> bytes:
    """Feed a command in a pod its input; what it printed.  Raises JobLost, VerbFailed."""
    for start in range(0, len(stdin), _CHUNK_BYTES):
        line.write_stdin(stdin[start : start + _CHUNK_BYTES])
    out, wrong = bytearray(), bytearray()
    while line.is_open():
        line.update(timeout=1)
        out += line.read_channel(1)
        wrong += line.read_channel(2)
    try:
        code = line.returncode
    except TypeError as error:  # the connection closed before the command's exit code came
        raise JobLost(f"the connection to {pod} broke") from error
    if code:
        printed = (bytes(wrong) or bytes(out)).decode("utf-8", "replace").strip()
        raise VerbFailed(printed.splitlines()[-1] if printed else f"{command[0]} ended with {code}")
    return bytes(out)
