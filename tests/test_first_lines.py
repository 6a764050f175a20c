"The three lines with which a page begins are run."
import re
from pathlib import Path
import nbformat
import pytest
import torch
from torch import nn
import opentrans
from opentrans.cost import cost

root = Path(__file__).resolve().parent.parent

def first_lines():
    "Pages that begin with three lines of Python that need nothing but what `names_for` gives."
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        for cell in nbformat.read(path, 4).cells[:3]:
            found = re.match(r'Use it in three lines:\n\n```python\n(.*?)\n```$', cell.source, re.S)
            if cell.cell_type == 'markdown' and found: yield pytest.param(found[1], id=path.stem)

def names_for(folder):
    "What the lines may use."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 1))
    public = {name: getattr(opentrans, name) for name in opentrans.__all__}
    clip = opentrans.ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    own = dict(model=model, clip=clip, mask=opentrans.SparseMask.magnitude(model, .1), folder=folder)
    return dict(public, torch=torch, nn=nn, cost=cost, opentrans=opentrans,
                world=opentrans.ShapesWorld('val', n=4, size=64), **own)

@pytest.mark.slow
@pytest.mark.parametrize('lines', list(first_lines()))
def test_the_first_lines_of_a_page_run(lines, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(root)
    exec(compile(lines, 'first lines', 'exec'), names_for(tmp_path))

def test_most_pages_begin_so():
    assert len(list(first_lines())) > 50
