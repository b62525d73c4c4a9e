"""Preemption signals, and the watchdog that ends a stuck process."""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator

from alexnet_jax.runtime.console import log, log_error

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class PreemptionHandler:
    """Context in which a preemption signal only sets `requested`.

    Schedulers and terminals may send several signals; the further ones have no effect. Only a second SIGINT (Ctrl-C)
    ends the process at once. SIGHUP stays ignored if the parent process ignores it, as nohup does.

    Args:
      ignore_afterwards: whether signals have no effect after the context, so that they cannot change the exit code of
        an ended run; otherwise the context restores the previous handlers.
    """

    def __init__(self, ignore_afterwards: bool = False):
        self.ignore_afterwards = ignore_afterwards
        self.received: signal.Signals | None = None
        self._logged = self._interrupted = self._delegated = False

    def __enter__(self) -> 'PreemptionHandler':
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._previous = {number: signal.signal(number, self._receive) for number in {*PREEMPTION_SIGNALS} - ignored}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.ignore_afterwards else handler)

    @property
    def requested(self) -> bool:
        """Whether a signal was received; the first access after the signal logs its name."""
        if self.received is None:
            return False
        if not self._logged:
            self._logged = True
            hint = '; a second Ctrl-C exits without saving' if self.received == signal.SIGINT else ''
            log(f'{self.received.name}: saving before the exit{hint}')
        return True

    def _receive(self, number: int, frame: object) -> None:
        # Nothing is printed here: the signal may interrupt a print() of the main thread.
        if number == signal.SIGINT and self._interrupted:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # the first process of a container survives the default action
        self._interrupted |= number == signal.SIGINT
        if self._delegated:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.received is None:
            self.received = signal.Signals(number)

    def delegate_to_jax(self) -> None:
        """Leaves SIGTERM to JAX, whose own handler notifies all processes, and turns the other signals into SIGTERM.

        A signal that was received before is sent again as SIGTERM; from now on `requested` is False.
        """
        # JAX logs why it aborts when the connection to another process breaks; a dump of all stacks would hide that.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        self._delegated = True
        received, self.received = self.received, None
        if received is not None:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def preemption_signals_blocked() -> Iterator[None]:
    """Blocks all preemption signals but SIGTERM. A child process that is started in the context keeps them blocked.

    The child process shares the terminal and the process group of this process, which receives the same signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*PREEMPTION_SIGNALS} - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watchdog:
    """Context that dumps all stacks and exits with code 1 after `timeout` seconds without a call of reset().

    The watchdog counts its own one-second waits, so the time during which the process is suspended does not count.
    """

    def __init__(self, timeout: int):
        self.timeout = timeout
        self.ended = threading.Event()
        self.reset('the start')

    def __enter__(self) -> 'Watchdog':
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()

    def reset(self, reached: str) -> None:
        """Resets the countdown; `reached` names the point that the process has reached."""
        self.reached, self.seconds = reached, 0

    def _watch(self) -> None:
        while not self.ended.wait(1.0):
            self.seconds += 1
            if self.seconds > self.timeout:
                log_error(
                    f'no progress since {self.reached} for config.distributed.watchdog_timeout={self.timeout} s;'
                    ' the stacks of all threads:'
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)
