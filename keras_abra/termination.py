import os
import signal
import sys
import threading


class Termination:
    """SIGTERM, the signal by which clusters ask a process to leave, turned into a question that is asked after each
    step. Signals reach the main thread only: in another one nothing is caught.

    Args:
        grace: seconds from the signal after which the process ends at once, if the question was not asked.
        code: exit code.
        explain: function that gives the text printed on leaving.
        alive: function of a stack frame, that of the main thread when the signal comes: whether the question will be
            asked at all. If not, the signal does what it did before.
    """

    def __init__(self, grace, code, explain, alive):
        self.grace, self.code, self.explain, self.alive = grace, code, explain, alive
        self._before = self._timer = None
        self.asked = self._waits = False

    def catch(self):
        """From now on the signal is noted."""
        self.asked = self._waits = False
        if threading.current_thread() is threading.main_thread() and self._before is None:
            self._before = signal.signal(signal.SIGTERM, self._note)

    def release(self, again=False):
        """Gives the signal back; with `again`, one that was noted also does now what it did before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
        self.wait()
        if again and self.asked:
            os.kill(os.getpid(), signal.SIGTERM)

    def wait(self):
        """No longer ends the process by itself: the question was asked, and what follows may take its time."""
        self._waits = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self):
        """Ends the program.

        Raises:
            SystemExit: always.
        """
        self.release()
        self._print("")
        raise SystemExit(self.code)

    def _note(self, number, frame):
        if not self.alive(frame):
            self.release()
            os.kill(os.getpid(), number)
            return
        self.asked = True
        if self._timer is None and not self._waits:
            self._timer = threading.Timer(self.grace, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self):
        self._print(f" neither a step nor the writing of a checkpoint ended within {self.grace:g} s;")
        os._exit(self.code)

    def _print(self, text):
        print(f"\nSIGTERM:{text} {self.explain()}", file=sys.stderr, flush=True)
