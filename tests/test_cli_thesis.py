"`opentrans spt`, `stitch` and `spvit` on a folder of pictures: files and figures, or one sentence."
import json
import numpy as np
import pytest
from PIL import Image
from opentrans.files import lock_folder
from test_cli import fails, opentrans

pytestmark = pytest.mark.usefixtures('one_thread')

TINY = '--pretrained', 'none', '--size', 64, '--batch-size', 8

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Noise in three shades, a folder for each."
    folder, rng = tmp_path_factory.mktemp('shades'), np.random.default_rng(0)
    for shade in (40, 120, 200):
        for i in range(5):
            (folder/str(shade)).mkdir(exist_ok=True)
            Image.fromarray((shade
                             + rng.uniform(-40, 40, (24, 24, 3))).astype(np.uint8)).save(
                folder/str(shade)/f'{i}.png')
    return folder

def test_spt(pictures, tmp_path):
    """Allocation and its table, the trained parts, merged weights, ONNX: the same outputs, and the budget within
    two per cent."""
    r = opentrans('spt', pictures, '--model', 'test_vit', *TINY, '--budget', 9000, '--rank', 2, '--epochs', 1,
                  '--samples', 6, '--out', tmp_path, '--onnx', '--json')
    assert r.returncode == 0, r.stderr
    told = json.loads(r.stdout)
    assert (8820 <= told['spent'] <= 9000 and told['merged_difference'] < 1e-5 and told['onnx_difference'] < 1e-3
            and told['samples'] == 6)
    assert {p.name for p in tmp_path.iterdir()} == {'.lock', 'allocation.json', 'table.csv', 'spt.safetensors',
                                                    'merged.safetensors', 'merged.onnx', 'report.json',
                                                    'settings.json'}
    assert json.loads((tmp_path/'report.json').read_text())['trained'] == told['spent'] + told['head']
    kept = json.loads((tmp_path/'settings.json').read_text())
    assert kept['command'] == 'spt' and kept['budget'] == 9000 and kept['model'] == 'test_vit'

def test_stitch(pictures, tmp_path):
    "Every stitch is drawn; as many networks as there are points are written."
    r = opentrans('stitch', pictures, '--models', 'test_vit,test_vit', *TINY, '--points', 2, '--epochs', 10,
                  '--out', tmp_path)
    assert r.returncode == 0, r.stderr
    lines = (tmp_path/'palette.csv').read_text().splitlines()
    assert len(lines) == 3 and 'flops' in lines[0] and 'trained parameters' in r.stdout
    assert len([*tmp_path.glob('stitch[0-9]*.safetensors')]) == 2 and (tmp_path/'stitches.safetensors').exists()

def test_spvit(pictures, tmp_path):
    "Fewer FLOPs, and the architecture as a file."
    r = opentrans('spvit', pictures, '--model', 'test_vit', *TINY, '--share', .6, '--search', 8, '--tune', 2,
                  '--gate-lr', .3, '--out', tmp_path, '--json')
    assert r.returncode == 0, r.stderr
    told = json.loads(r.stdout)
    assert told['gflops'] < told['gflops_before']
    assert (json.loads((tmp_path/'hybrid.json').read_text())['ops'] == told['operations'].split()
            and (tmp_path/'slim.safetensors').exists())

@pytest.mark.parametrize('command', (('spt', '--model', 'test_vit'), ('stitch', '--models', 'test_vit,test_vit'),
                                     ('spvit', '--model', 'test_vit')))
def test_two_commands_do_not_share_a_folder(pictures, tmp_path, command):
    "The second one is refused, and leaves what the first one has written; a refused one in a new folder leaves none."
    name, *models = command
    with lock_folder(tmp_path):
        assert 'Another run is at work' in fails(name, pictures, *models, *TINY, '--out', tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ['.lock']
    assert 'a smaller l' in fails(name, pictures, *models, *TINY, '--lr', 1e30, '--out', tmp_path/'new')
    assert not (tmp_path/'new').exists() or name == 'spt' # whose allocation is there before it is trained

@pytest.mark.parametrize('args, words',
                         [(('spt', 'nowhere'), 'There is no folder'),
                          (('spt', '.', '--model', 'test_vi'), 'test_vit'),
                          (('spt', '.', '--model', 'test_vit'), 'Say which weights'),
                          (('spt', '.', '--model', 'test_vit', '--pretrained', 'timm'), '--allow-hub'),
                          (('spt', '.', '--model', 'test_vit', '--pretrained', 'none.pth'), 'No checkpoint'),
                          (('spt', '.', '--model', 'test_vit', *TINY, '--kind', 'prompt'), 'lora, adapter, none'),
                          (('stitch', '.', '--models', 'test_vit'), 'at least two'),
                          (('stitch', '.', '--models', 'test_vit,test_vit', '--pretrained', 'a,b,c'),
                           'Give one for each'), (('spvit', '.', '--model', 'resnet18', *TINY), 'ResNet'),])
def test_what_cannot_be_is_one_sentence(args, words, pictures, tmp_path):
    places = {'.': pictures, 'nowhere': tmp_path/'nowhere'}
    args = [places.get(a, a) for a in args]
    assert words in fails(*args)
