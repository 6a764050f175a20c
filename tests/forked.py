"""Processes that begin with everything imported.

A fresh interpreter takes ten seconds of a core to import torch, open_clip and this package. Here a server imports
them once for each worker of pytest, and forks for each process that a test asks for. What the start of the command
itself must do (its imports, a terminal, a launcher) is tested with `subprocess`."""
import functools, gc, multiprocessing, os, runpy, signal, subprocess, sys, tempfile, types, warnings
from pathlib import Path
from conftest import free_port, IMPORTED, PATIENCE
from opentrans.runtime import usual_start_method

@functools.cache
def server():
    "The context of forked processes, for which everything is imported."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(IMPORTED)
    return context

def run_here(words):
    "What `python WORDS` does: `-m MODULE`, `-c CODE` or a script, with its arguments."
    if words[0] == '-W':
        warnings.simplefilter(words[1])
        words = words[2:]
    kind,*rest = words
    if kind == '-m':
        sys.argv = rest
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    elif kind == '-c':
        sys.argv = ['-c', *rest[1:]]
        main = sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(rest[0], '<string>', 'exec'), vars(main))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name='__main__')

def forget_package():
    "Let this process import the package anew, as a new interpreter would; what it imports of others is there."
    for name in [*sys.modules]:
        if name.split('.')[0] == 'opentrans': del sys.modules[name]

def work(words, environment, folder, out, err):
    "The life of a forked process."
    gc.freeze()     # what the server has imported is no garbage
    usual_start_method()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number,file in ((1, out), (2, err)): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path in reversed(environment.get('PYTHONPATH', '').split(os.pathsep)):
        if path and path not in sys.path: sys.path.insert(0, path)
    run_here(words)

class Forked:
    "A forked process, by the names of `subprocess.Popen`. Without `env` it has the environment of this one."
    def __init__(self, words, env, cwd, folder, name=''):
        env = dict(os.environ if env is None else env)
        self.args = list(map(str, words))
        self.out,self.err = Path(folder)/f'out{name}.txt',Path(folder)/f'err{name}.txt'
        for file in (self.out, self.err): file.write_text('')
        self.process = server().Process(target=work, args=(self.args, env, str(cwd), str(self.out), str(self.err)))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=PATIENCE):
        "Its exit code. Raises `subprocess.TimeoutExpired`."
        self.process.join(timeout)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def poll(self): return self.process.exitcode
    def kill(self): self.process.kill()
    def terminate(self): self.process.terminate()
    def send_signal(self, number): os.kill(self.pid, number)
    def said(self): return self.err.read_text()

    def result(self, timeout=PATIENCE):
        "What `subprocess.run` gives. One that does not end in time is killed."
        try: code = self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return subprocess.CompletedProcess(self.args, code, self.out.read_text(), self.err.read_text())

def python(*words, env=None, cwd):
    "`python WORDS`, forked: what `subprocess.run` gives."
    with tempfile.TemporaryDirectory() as folder: return Forked(words, env, cwd, folder).result()

def two_processes(*words, env, cwd):
    "`python WORDS` in two processes that know each other, as `accelerate launch` starts them: what each has said."
    team = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                ACCELERATE_MIXED_PRECISION='no', ACCELERATE_DYNAMO_BACKEND='NO')
    with tempfile.TemporaryDirectory() as folder:
        both = [Forked(words, {**env, **team, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}, cwd, folder, rank)
                for rank in (0, 1)]
        return [each.result() for each in both]
