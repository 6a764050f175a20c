"Children of the scripts beside the tests: processes that begin as the script stands, do one thing and end."
import os, traceback

def fork(work, *args, **options):
    """Does the work in a child and gives its id. The child ends with the exit code that the work gives, or 0; after an
    error, which it tells, with 9."""
    if pid := os.fork(): return pid
    try:
        os._exit(work(*args, **options) or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(9)

def exit_code(pid):
    "Waits for the end of a child. The code is negative if a signal has ended it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
