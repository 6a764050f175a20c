"What `help` shows of the public names: what parameters mean, and an example that runs."
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import opentrans
from opentrans.helping import _of_class, _of_function, document, examples
from forked import python

root = Path(__file__).resolve().parent.parent
PUBLIC = sorted(opentrans.__all__)


def params_of(thing):
    "Parameters of a public function or class, as `help` shows them."
    if isinstance(thing, FunctionType): return _of_function(thing)[0]
    return _of_class(thing) if isinstance(thing, type) else []


@pytest.mark.parametrize('name', PUBLIC)
def test_each_parameter_of_a_public_name_has_a_meaning(name):
    bare = [param.name for param in params_of(getattr(opentrans, name)) if not param.meaning]
    assert not bare, f'{name}: a comment beside {", ".join(bare)} would say what it means'


@pytest.mark.parametrize('name', PUBLIC)
def test_help_shows_parameters_and_an_example(name):
    thing = getattr(opentrans, name)
    doc = inspect.getdoc(thing) or ''
    assert examples().get(name), f'assets/examples.txt has no example of {name}'
    if not isinstance(thing, (FunctionType, type)): return # `help` of a value shows its class
    assert '>>> ' in doc and doc.split('\n')[0].strip()
    for param in params_of(thing):
        assert f'\n{param.name}' in doc and ' '.join(param.meaning.split()) in ' '.join(doc.split())


FROM_TWO_PLACES = """
from forked import forget_package
forget_package()
from opentrans.pruning import imp
import opentrans
print(imp.__doc__.count('Example'), opentrans.imp is imp)
"""

def test_help_is_the_same_from_every_place():
    "The example is shown however a name was imported, and once."
    run = python('-c', FROM_TWO_PLACES, cwd=root)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ['1', 'True']


def test_parameters_that_are_passed_on_are_shown_too():
    assert 'skip_first : bool, default True' in opentrans.SparseMask.magnitude.__doc__
    assert opentrans.imp.__doc__.index('settings :') < opentrans.imp.__doc__.index('skip_first :')


def test_documented_twice_is_documented_once():
    before = opentrans.imp.__doc__
    document('opentrans.pruning')
    assert opentrans.imp.__doc__ == before


def test_nothing_of_it_is_loaded_before_it_is_asked_for():
    code = "import opentrans, sys\nprint([name for name in sys.modules if name.startswith('opentrans.')])"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == '[]'


@pytest.fixture(scope='module')
def executed():
    "What went wrong in each example; they run in a process of their own, for some of them register things."
    run = python(root/'tests'/'run_examples.py', cwd=root)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize('name', PUBLIC)
def test_the_example_runs(executed, name):
    assert executed[name] == ''
