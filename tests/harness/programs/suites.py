"""Runs modules of Python's own tests: `suites.py FILE MODULE[:PATTERN]...`; of a module with a pattern, only the tests whose name
contains it. Writes a line into FILE for each test, its outcome and its name, and prints how many there were and how long they took.
What the tests themselves print goes to FILE.log. There is no os.fork, as on some systems."""

import os
import sys
import time
import unittest

del os.fork  # Before the tests look for it.

from test import support
from test.support import script_helper


class Outcomes(unittest.TestResult):
    """The outcome of each test; of several, such as those of subtests, the worst."""

    def __init__(self):
        super().__init__()
        self.outcomes = {}

    def put(self, test, outcome, detail=None):
        order = ["ok", "skipped", "failed"]
        name = test.id()
        old = self.outcomes.get(name, "ok")
        self.outcomes[name] = max(old, outcome, key=order.index)
        if detail is not None:
            sys.stderr.write(f"{name}: {detail}\n")

    def addSuccess(self, test):
        self.put(test, "ok")

    def addSkip(self, test, reason):
        self.put(test, "skipped")

    def addExpectedFailure(self, test, error):
        self.put(test, "ok")

    def addFailure(self, test, error):
        self.put(test, "failed", self._exc_info_to_string(error, test))

    addError = addFailure

    def addUnexpectedSuccess(self, test):
        self.put(test, "failed", "unexpected success")

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.put(test, "failed", self._exc_info_to_string(error, test))


def assert_python_ok(*args, of_python=script_helper.assert_python_ok, **env):
    """As Python's own, but a program that would end itself after two seconds (as in test_finalize_with_trace) has twenty."""
    return of_python(*(arg.replace("time.sleep(2)", "time.sleep(20)") for arg in args), **env)


def cases(suite):
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from cases(one)
        else:
            yield one


def main():
    # Tests write their files where they are started.
    os.makedirs("/tmp/suites", exist_ok=True)
    os.chdir("/tmp/suites")
    support.use_resources = ["cpu", "subprocess"]
    # The tests' own limits of time are for processors that are not emulated.
    for limit in ["LOOPBACK_TIMEOUT", "SHORT_TIMEOUT", "LONG_TIMEOUT"]:
        setattr(support, limit, 10 * getattr(support, limit))
    script_helper.assert_python_ok = assert_python_ok
    file = open(sys.argv[1], "w")
    said = os.dup(1)
    log = os.open(sys.argv[1] + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for word in sys.argv[2:]:
        name, _, pattern = word.partition(":")
        found = cases(unittest.defaultTestLoader.loadTestsFromName("test." + name))
        suite = unittest.TestSuite(case for case in found if pattern in case.id())
        result, start = Outcomes(), time.monotonic()
        suite.run(result)
        seconds = time.monotonic() - start
        outcomes = result.outcomes
        file.writelines(f"{outcome} {test}\n" for test, outcome in sorted(outcomes.items()))
        file.flush()
        os.write(said, f"{name}: {len(outcomes)} tests in {seconds:.1f} s\n".encode())


if __name__ == "__main__":
    main()
