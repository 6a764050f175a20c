"""Execute the examples that `help` shows, each with the names that opentrans/assets/examples.txt promises.

python tests/run_examples.py            a JSON object: name -> what went wrong; '' where nothing did
python tests/run_examples.py NAME ...   some of them
"""
import contextlib
import doctest
import io
import json
import sys
import tempfile
import time
import warnings

import matplotlib

matplotlib.use('Agg')
import torch
from torch import nn

import opentrans
from opentrans.cost import cost
from opentrans.helping import examples


def prepared(folder):
    "The names that an example may use."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 1))
    clip = opentrans.ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    public = {name: getattr(opentrans, name) for name in opentrans.__all__}
    return dict(public, torch=torch, nn=nn, cost=cost, net=net, clip=clip, folder=folder)


def executed(name, text):
    "What went wrong in an example, as doctest tells it."
    with tempfile.TemporaryDirectory() as folder:
        test = doctest.DocTestParser().get_doctest(text + '\n', prepared(folder), name, None, 0)
        said = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        with contextlib.redirect_stderr(io.StringIO()): runner.run(test, out=said.write)
    return said.getvalue()


def main(names):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    result = {}
    for name, text in examples().items():
        if names and name not in names: continue
        began = time.perf_counter()
        result[name] = executed(name, text)
        print(f'{name}: {time.perf_counter()-began:.1f} s', file=sys.stderr)
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main(sys.argv[1:])
