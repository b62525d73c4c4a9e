"""Preemption signals, and the watchdog that ends a stuck process."""

import faulthandler
import os
import signal
import threading

from alexnet_jax.runtime.console import log_error


class PreemptionHandler:
    """Context in which the first SIGTERM or Ctrl-C only sets `requested`; a second one has its usual effect."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False

    def __enter__(self) -> 'PreemptionHandler':
        self.previous = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        for other, handler in self.previous.items():
            signal.signal(other, handler)
        os.write(
            2, f'{signal.Signals(number).name}: saving before the exit; a second signal exits without saving\n'.encode()
        )

    def delegate_to_jax(self) -> None:
        """Leaves SIGTERM to JAX, whose own handler notifies all processes, and turns the first Ctrl-C into SIGTERM."""
        signal.signal(signal.SIGINT, self._pass_on)
        # JAX logs why it aborts when the connection to another process breaks; a dump of all stacks would hide that.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    def _pass_on(self, number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


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
