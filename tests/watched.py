"""What `test_security` runs: python watched.py FORGED MARKER reads lines of JSON, each a command as a list of words or
a text of Python, and does them; one as {"apart": ...} is done by a fork, so that it leaves nothing behind. For each it
prints a line of JSON: exit code, what was said, what was seen (the network, another program, code of the folder
FORGED), and whether the file MARKER has appeared."""
import contextlib, io, json, os, sys, traceback
import torch
import open_clip, pandas, transformers      # noqa: F401 what they do while they are imported is not watched
from opentrans import cli
from opentrans.all import OpenTransError

NET = ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto', 'socket.bind',
       'urllib.Request', 'http.client.connect')
RUN = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'pty.spawn')

class Watch:
    "Hears what the interpreter does, and keeps what it should not do; there is no network."
    def __init__(self, forged):
        self.forged = forged
        self.seen = []

    def __call__(self, event, args):
        if event in NET:
            self.seen.append(f'{event} {args[-2:]!r}'[:200])
            raise PermissionError(f'no network in this test: {event}')
        if event in RUN and 'opentrans' not in repr(args): self.seen.append(f'{event} {args[:2]!r}'[:200])
        if event == 'exec' and self.forged in str(getattr(args[0], 'co_filename', '')):
            self.seen.append(f'exec {args[0].co_filename}')
        if event == 'compile' and self.forged in str(args[1]): self.seen.append(f'compile {args[1]}')

def command(args):
    "The exit code of a command."
    sys.argv = ['opentrans', *args]
    try: cli.main()
    except SystemExit as ended: return ended.code or 0
    return 0

def call(text):
    "Runs a text of Python: 0."
    exec(text, {})
    return 0

def done(told):
    "Exit code of a command or a text, and what it said; 2 for a sentence, 'traceback' for any other error."
    out, code = io.StringIO(), 'traceback'
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try: code = command(told) if isinstance(told, list) else call(told)
        except OpenTransError as error:
            print(error)
            code = 2
        except BaseException: traceback.print_exc()
    return code, out.getvalue()[-1500:]

def apart(work):
    "Does a piece of work in a forked process."
    child = os.fork()
    if child: os.waitpid(child, 0)
    else:
        try: work()
        finally: os._exit(0)

def main(forged, marker):
    torch.set_num_threads(1)
    watch = Watch(forged)
    sys.addaudithook(watch)
    def tell(told):
        before = len(watch.seen)
        code, said = done(told)
        ran = os.path.exists(marker)
        print(json.dumps(dict(told=told, code=code, said=said, seen=watch.seen[before:], ran=ran)), flush=True)
        if ran: os.unlink(marker)
    for line in sys.stdin:
        told = json.loads(line)
        if isinstance(told, dict): apart(lambda: tell(told['apart']))
        else: tell(told)

if __name__ == '__main__': main(*sys.argv[1:])
