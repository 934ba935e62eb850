"""Several processes as one engine, on one machine or on many (ADR 017).

jax joins them: its coordination service knows who is alive, and stops all where one dies; XLA's
collectives are all that passes between devices. What is here is what the first process, the
controller, tells the others beside that: messages through the service's key-value store, in one
order. Each is a name, JSON, and some bytes. They never wait for a device, as a broadcast over the
devices would: the controller may be a step ahead of them, and idle for as long as it likes.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread, Timer
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed  # JAX has no public way to its service's client

from jaxinfer.errors import JaxinferError

ADDRESS, COUNT, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Without a sign of life for so long a process counts as dead. Threads of XLA's send them, whatever
# the process computes or compiles.
HEARTBEAT_S = 6
INITIALISE_S = 300  # until all processes have started
JOIN_S = 600  # until all have come to the same place of the program
SHUTDOWN_S = 3600  # that a process which has ended waits for the others, while they live
GRACE_S = 3  # for jax to take its leave when a process is stopped
POLL_MS = 1000  # of waiting without an end, so that Ctrl-C is heard
WINDOW = 64  # messages between two times that the controller waits for the others to have read them


class Message(NamedTuple):
    """From the controller: what to do, with what."""

    name: str
    told: dict[str, Any]
    payload: bytes


def start() -> bool:
    """Joins this process with those that the variables above, or a cluster that jax knows (Slurm,
    Open MPI, Kubernetes), tell of; must come before anything is computed. After
    `jax.distributed.initialize` it does nothing.

    Returns:
        Whether there are several processes.

    Raises:
        JaxinferError: the variables are incomplete, or no numbers.
    """
    if not jax.distributed.is_initialized():
        address, count, process = os.environ.get(ADDRESS), _number(COUNT), _number(PROCESS)
        devices, given = None, None not in (address, count, process)
        if not given:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                address, count, process, None, None, INITIALISE_S
            )
            address, count, process, devices = found
        if address is not None and (count is None or process is None):
            raise JaxinferError(f"{ADDRESS}={address}: expected {COUNT} and {PROCESS} with it")
        if address is None and (count, process) != (None, None):
            raise JaxinferError(f"{COUNT}={count}, {PROCESS}={process}: expected {ADDRESS} too")
        if count is None or count == 1:
            return False
        if process not in range(count):
            raise JaxinferError(f"{PROCESS}={process}: expected 0 to {count - 1}, one for each")
        jax.distributed.initialize(
            address, count, process, devices,
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=INITIALISE_S, heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )  # fmt: skip
    return distributed.global_state.num_processes > 1


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise JaxinferError(f"{name}={value!r}: expected an integer of at least 0")
    return None if value is None else int(value)


def leads() -> bool:
    """Whether this is the controller, or the only process."""
    return distributed.global_state.process_id == 0


def connect() -> Link | None:
    """A link between the processes that jax has joined; None: there is one process alone.

    All of them must call it equally often, and in the same order.
    """
    several = jax.distributed.is_initialized() and distributed.global_state.num_processes > 1
    return Link() if several else None


@contextmanager
def together(link: Link | None, *, running: bool = False) -> Iterator[None]:
    """What goes wrong inside stops the other processes too; see `Link.fail`."""
    try:
        yield
    except BaseException as error:
        if link is not None:
            link.fail(error, running=running)
        raise


class Link:
    """What the processes of one `LLM` tell each other.

    Attributes:
        process: number of this one; 0 is the controller.
        count: how many there are.
    """

    def __init__(self) -> None:
        state = distributed.global_state
        self.process, self.count = state.process_id, state.num_processes
        self._client: Any = state.client
        # The same in all processes, which make the same LLMs in the same order.
        made = self._client.key_value_increment(f"jaxinfer/{self.process}", 1)
        self._root = f"jaxinfer/llm{made}"
        self._sent, self._met = itertools.count(), itertools.count()
        self._over, self._stopping = Event(), False
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()
        atexit.register(self.close)  # before jax takes its leave

    @property
    def leads(self) -> bool:
        """Whether this is the controller."""
        return self.process == 0

    def check_leads(self) -> None:
        """Raises JaxinferError on all processes but the controller."""
        if not self.leads:
            raise JaxinferError(
                f"process {self.process} of {self.count} follows process 0: expected llm.follow()"
            )

    # -- from the controller to the others -----------------------------------------------------

    def send(self, name: str, payload: bytes = b"", **told: Any) -> None:
        """Tells all others; what is sent they get in this order.

        Raises:
            JaxinferError: this is not the controller, or the link is closed.
        """
        self.check_leads()
        if self._ended():
            raise JaxinferError("the processes of this LLM have parted")
        number = next(self._sent)
        header = json.dumps([name, told]).encode()
        self._client.key_value_set_bytes(self._place(number), header + b"\0" + payload)
        self._catch_up(number)

    def messages(self) -> Iterator[Message]:
        """What the controller sends, until it closes the link."""
        for number in itertools.count():
            header, _, payload = self._wait_for(self._place(number)).partition(b"\0")
            self._catch_up(number)
            name, told = json.loads(header)
            if name == "close":
                self._over.set()
                return
            yield Message(name, told, payload)

    def _place(self, number: int) -> str:
        return f"{self._root}/messages/{number // WINDOW}/{number}"

    def _catch_up(self, number: int) -> None:
        """Now and then the controller waits until all have read what it sent, and cleans up."""
        if (number + 1) % WINDOW == 0:
            self.meet()
            if self.leads:
                self._client.key_value_delete(f"{self._root}/messages/{number // WINDOW}/")

    def _wait_for(self, key: str) -> bytes:
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, POLL_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    # -- among all -----------------------------------------------------------------------------

    def meet(self) -> None:
        """Waits until all processes are here.

        Raises:
            JaxRuntimeError: one did not come within `JOIN_S`; names it.
        """
        self._client.wait_at_barrier(f"{self._root}/meet/{next(self._met)}", 1000 * JOIN_S)

    def gather(self, value: Any) -> list[Any]:
        """The values, of JSON types, that all processes give here, in their order.

        Raises:
            JaxinferError: a process did not come within `JOIN_S`; names it.
        """
        place = f"{self._root}/gather/{next(self._met)}"
        self._client.key_value_set(f"{place}/{self.process}", json.dumps(value))
        found = []
        for process in range(self.count):
            try:
                text = self._client.blocking_key_value_get(f"{place}/{process}", 1000 * JOIN_S)
            except jax.errors.JaxRuntimeError as error:
                raise JaxinferError(
                    f"process {process} of {self.count} made no LLM within {JOIN_S} s: {error}"
                ) from error
            found.append(json.loads(text))
        return found

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets the others go, if this is the controller; else it leaves them in the middle of
        their work, which is a failure. Nothing more where the link is over."""
        if not self._ended():
            if self.leads:
                self.send("close")
                self.part()
            else:
                self.fail(JaxinferError("it left before process 0 closed its LLM"))
        self._watcher.join()  # a thread in XLA's code while Python ends would abort the process

    def part(self, reason: str = "") -> None:
        """Ends the link for all processes; with a reason, those that do not know of it stop."""
        self._over.set()
        with suppress(jax.errors.JaxRuntimeError):  # another was first, or the service is gone
            self._client.key_value_set(f"{self._root}/over", reason)

    def fail(self, error: BaseException, *, running: bool = False) -> None:
        """Stops all other processes, which say why. This one is to end too; jax stops it if not.

        `running`: it may come of the death of another process, which a collective found out first.
        """
        if self._ended():
            return
        what = f"{type(error).__name__}: {error}"
        if running and isinstance(error, ValueError | jax.errors.JaxRuntimeError):
            # XLA's. If another process has died, jax says which, and ends this one.
            _say(f"process {self.process} of {self.count}: {what}; did another process die?")
            if self._over.wait(HEARTBEAT_S + GRACE_S) and self._ended():
                return
        self.part(f"process {self.process} of {self.count} failed: {what}")

    def _ended(self) -> bool:
        """Whether the link is over. If that is because `_watch` ends this process, it does so
        here: nothing else is to be said or undone."""
        if self._stopping:
            time.sleep(2 * GRACE_S)
        return self._over.is_set()

    def _watch(self) -> None:
        """Ends this process when another one fails: it may wait for that one in a collective, which
        nothing else interrupts."""
        while not self._over.is_set():
            try:
                reason = self._client.blocking_key_value_get(f"{self._root}/over", POLL_MS)
            except jax.errors.JaxRuntimeError:
                self._over.wait(0.01)  # nobody has; or the service is gone, and jax ends this one
                continue
            if self._over.is_set() or not reason:
                return
            self._stopping = True
            self._over.set()
            _say(f"{reason}; process {self.process} stops")
            leave = Timer(GRACE_S, os._exit, (1,))
            leave.daemon = True
            leave.start()
            jax.distributed.shutdown()  # so that the other need not wait for this one's heartbeats
            os._exit(1)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"jaxinfer: {text}", file=sys.stderr, flush=True)
