"The script that proves a GPU machine, in miniature; what its bundle must hold."
import importlib.metadata, json, os, re, subprocess, sys, zipfile
from pathlib import Path
import pytest
from forked import python

BENCHMARKS = Path(__file__).parents[1]/'benchmarks'
QUICK = 'mask,imp,semi_structured,one_process,sparse,finetune fpn'

def test_a_check_in_miniature(tmp_path):
    "Checks run, what needs a GPU says so, and all is in one file."
    out = tmp_path/'r.json'
    words = ('--device', 'cpu', '--tiny', '--only', QUICK, '--bundle', '', '--out', out)
    r = python(BENCHMARKS/'gpu_check.py', *words, env=dict(os.environ, OMP_NUM_THREADS='1'), cwd=tmp_path)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    told = json.loads(out.read_text())
    states = {name: found['state'] for name,found in told['checks'].items()}
    assert states == {name: 'skipped' if name == 'semi_structured' else 'ok' for name in QUICK.split(',')}
    assert told['checks']['semi_structured']['why'] == 'needs CUDA' and told['tiny'] and told['torch']
    assert '5 ok, 1 skipped, 0 failed' in r.stdout

def test_a_check_survives_another(script, capsys, monkeypatch):
    "One that fails, one that takes too long, one whose process is gone: the next one runs."
    check = script('gpu_check')
    answers = iter([('ok', {}), TimeoutError('no answer within 1 s'), EOFError(), ('ok', {})])
    began = []
    class Pipe:
        def send(self, name): pass
    class Worker(check.Worker):
        def start(self):
            self.process,self.pipe = object(),Pipe()
            began.append(1)
        def end(self): self.process = None
        def _hear(self, seconds):
            answer = next(answers)
            if isinstance(answer, Exception): raise answer
            return answer
    worker = Worker()
    found = [worker.run(name, 1) for name in 'abcd']
    assert (found == [('ok', {}), ('failed', 'no answer within 1 s'), ('failed', 'the process ended'), ('ok', {})]
            and len(began) == 3)

def test_each_framework_has_a_check(script):
    "They come from the registry."
    from opentrans.frameworks import list_frameworks
    check = script('gpu_check')
    check.add_frameworks()
    assert ({f'finetune {name}' for name in list_frameworks()} <= set(check.CHECKS)
            and list(check.CHECKS)[-1] == 'compiled')
    assert check.main(['--device', 'cpu', '--only', 'no_such_check']) == 2

ASKS = """
import importlib, pkgutil, sys
import opentrans
for part in ('all', 'cka', 'clip', 'data', 'distill', 'frameworks', 'heavy_tail', 'pruning', 'training'):
    importlib.import_module(f'opentrans.{part}')
for found in pkgutil.iter_modules(opentrans.frameworks.__path__, 'opentrans.frameworks.'):
    if 'detectron2' not in found.name: importlib.import_module(found.name)
print(*sorted({name.split('.')[0] for name in sys.modules}))
"""

def closure(names):
    "All that some distributions need, themselves among it."
    pytest.importorskip('packaging')
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    seen,todo = set(),list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen: continue
        seen.add(name)
        try: needs = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError: continue
        todo += [need.name for need in needs if need.marker is None or need.marker.evaluate(dict(extra=''))]
    return seen

def required():
    "Names of the distributions that this package requires."
    import configparser
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
    return [re.split(r'[<>=!~]', name)[0] for name in settings['DEFAULT']['requirements'].split()]

@pytest.mark.slow
def test_the_bundle_holds_what_is_missing(script):
    "Whatever our requirements import that the four libraries do not bring is among the wheels."
    from packaging.utils import canonicalize_name
    bundle = {canonicalize_name(name) for name in script('gpu_bundle').WHEELS}
    there = closure(['torch', 'torchvision', 'timm', 'transformers'])
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', ASKS], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    owners = importlib.metadata.packages_distributions()
    used = {canonicalize_name(owner) for name in r.stdout.split() for owner in owners.get(name, ())}
    ours = closure(required()) - {'accelerate', 'psutil'} # transformers takes them where they are
    assert (used & ours) - there - bundle == set()

def test_a_wheel_without_its_tests(script, tmp_path):
    "The rest is as it was."
    wheel = tmp_path/'a-1-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as file:
        file.writestr('a/__init__.py', 'x = 1')
        file.writestr('a/tests/test_a.py', 'assert True')
    script('gpu_bundle').slim(wheel)
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ['a/__init__.py'] and file.read('a/__init__.py') == b'x = 1'
