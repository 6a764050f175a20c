"The command as a stranger types it: good input gives files and figures, bad input one sentence and exit code 2."
import contextlib, io, json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image

root = Path(__file__).resolve().parent.parent
coco = root.parent/'shared'/'data'/'samples'/'coco_panoptic'

def in_a_process(*args):
    "The command in a process of its own, as a shell starts it."
    env = dict(os.environ, OMP_NUM_THREADS='1', OPENTRANS_PROGRESS='0')
    return subprocess.run([sys.executable, '-c', 'from opentrans.cli import main; main()', *map(str, args)], capture_output=True, text=True, env=env, cwd=root)

def opentrans(*args):
    "The command in this process, which spares the start of torch each time."
    from opentrans.cli import main
    out,err,argv = io.StringIO(),io.StringIO(),sys.argv
    sys.argv = ['opentrans', *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): main()
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = argv
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

def fails(*args):
    "The one sentence of a command that must fail with exit code 2."
    r = opentrans(*args)
    assert r.returncode == 2, (args, r.returncode, r.stdout[-500:], r.stderr[-2000:])
    assert 'Traceback' not in r.stderr
    lines = [l for l in r.stderr.splitlines() if l.startswith('error: ')]
    assert len(lines) == 1, r.stderr
    return lines[0]

@pytest.fixture(scope='module')
def mask(tmp_path_factory):
    path = tmp_path_factory.mktemp('mask')/'m.safetensors'
    r = opentrans('prune', '--method', 'magnitude', '--out', path)
    assert r.returncode == 0, r.stderr
    return path

@pytest.fixture(scope='module')
def streets(tmp_path_factory):
    "A folder data set: images as jpg and png, 11 classes and a void value."
    folder,rng = tmp_path_factory.mktemp('streets'),np.random.default_rng(0)
    (folder/'images').mkdir(); (folder/'labels').mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder/'images'/f's{i}.{"jpg" if i%2 else "png"}')
        Image.fromarray(rng.integers(0, 12, (60, 80), dtype=np.uint8)).save(folder/'labels'/f's{i}.png')
    return folder

NAMES = 'sky,building,pole,road,pavement,tree,sign,fence,car,person,bicycle'

def test_usage_errors():
    r = in_a_process('nonsense')
    assert r.returncode == 2 and 'nonsense' in r.stderr and 'Traceback' not in r.stderr
    assert opentrans('prune').returncode == 2                                    # --out is missing
    assert opentrans('demo', '--seeds', 'many').returncode == 2

def test_bad_input_is_one_sentence(tmp_path, mask):
    out = tmp_path/'x.safetensors'
    assert 'density must be a number in (0, 1]' in fails('prune', '--density', '1.5', '--out', out)
    assert 'density must be a number in (0, 1]' in fails('prune', '--density', '0', '--method', 'random', '--out', out)
    assert "Unknown framework 'nope'" in fails('evaluate', '--framework', 'nope')
    assert 'No mask file' in fails('transfer', tmp_path/'none.safetensors')
    (tmp_path/'cut.safetensors').write_bytes(mask.read_bytes()[:500])
    fails('transfer', tmp_path/'cut.safetensors')
    assert 'No weights file' in fails('alpha', 'shapes-rn', '--pretrained', tmp_path/'none.pt')
    assert '--pretrained' in fails('prune', '--backbone', 'RN50', '--out', out)
    (tmp_path/'empty').mkdir()
    fails('evaluate', '--data', 'folder', '--root', tmp_path/'empty', '--classes', NAMES)
    fails('evaluate', '--data', 'coco_panoptic', '--root', tmp_path/'empty')
    assert 'no folder' in fails('data', 'check', 'ade20k_150', '--root', tmp_path/'nowhere')
    assert "Unknown data set" in fails('data', 'check', 'coco')
    assert 'seeds=0' in fails('demo', '--seeds', '0', '--out', tmp_path/'demo')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cut.safetensors', 'empty'] and not list((tmp_path/'empty').iterdir())   # nothing half-written

def test_evaluate_folder(streets, tmp_path):
    "What a user with own data types."
    r = opentrans('evaluate', '--data', 'folder', '--root', streets, '--classes', NAMES, '--ignore', 11, '--framework', 'deeplabv3', '--backbone', 'shapes-rn', '--out', tmp_path/'out')
    assert r.returncode == 0, r.stderr
    res = json.loads((tmp_path/'out'/'result.json').read_text())
    assert 0 <= res['miou'] <= 1 and list(res['iou']) == NAMES.split(',') and res['n_images'] == 4 and res['head'] == 'untrained'

def test_labels_outside_the_names(streets):
    assert '11' in fails('evaluate', '--data', 'folder', '--root', streets, '--classes', NAMES)      # the void value is not named

def test_finetune_then_evaluate(streets, mask, tmp_path):
    assert opentrans('alpha', 'shapes-rn', '--mask', mask, '--out', tmp_path/'alpha').returncode == 0
    r = opentrans('finetune', '--data', 'folder', '--root', streets, '--classes', NAMES, '--ignore', 11, '--iterations', 3, '--batch-size', 2, '--mask', mask,
                  '--selection', tmp_path/'alpha'/'selection.json', '--out', tmp_path/'run')
    assert r.returncode == 0, r.stderr
    r = opentrans('evaluate', '--model', tmp_path/'run', '--data', 'folder', '--root', streets, '--classes', NAMES, '--ignore', 11, '--json')
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)['head'] == 'trained'
    from opentrans.core import LayerSelection, load_tensors
    from opentrans.clip import ClipBackbone
    from opentrans.pruning import SparseMask
    w,m,before = load_tensors(tmp_path/'run'/'model.safetensors')[0],SparseMask.load(mask),dict(ClipBackbone.create('shapes-rn', pretrained='shapes-rn').visual.named_parameters())
    frozen = set(LayerSelection.from_json(tmp_path/'alpha'/'selection.json').freeze)
    for n in m.names:
        after = w[f'backbone.visual.{n}']
        assert (after[~m[n]] == 0).all()
        assert (after[m[n]] == before[n].detach()[m[n]]).all() == (n in frozen), n                # frozen layers rest, the others move

def test_transfer_on_shapes(mask, tmp_path):
    r = opentrans('transfer', mask, '--iterations', 2, '--warmup', 1, '--batch-size', 2, '--limit', 4, '--out', tmp_path/'t')
    assert r.returncode == 0, r.stderr
    res = json.loads((tmp_path/'t'/'result.json').read_text())
    assert res['frozen'] and abs(res['density']-.1) < 5e-4 and set(res['groups']) == {'base', 'novel'}

def test_transfer_to_a_checkpoint(mask, tmp_path):
    "A mask on a state dict on disk, in OpenAI's names."
    from opentrans.clip import ClipBackbone
    from opentrans.core import load_tensors
    from opentrans.pruning import SparseMask
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    torch.save({f'visual.{k}': v for k,v in clip.visual.state_dict().items()} | {'logit_scale': torch.tensor(3.)}, tmp_path/'model.pth')
    r = opentrans('transfer', mask, tmp_path/'model.pth', '--out', tmp_path/'sparse.safetensors')
    assert r.returncode == 0, r.stderr
    sd,m = load_tensors(tmp_path/'sparse.safetensors')[0],SparseMask.load(mask)
    for n in m.names: assert torch.equal(sd[f'visual.{n}'] != 0, m[n] & (dict(clip.visual.named_parameters())[n] != 0))
    assert torch.equal(sd['visual.conv1.weight'], clip.visual.conv1.weight) and sd['logit_scale'] == 3

def test_data_round_trip(tmp_path):
    assert opentrans('data', 'shapes', '--out', tmp_path/'w', '--n', 3).returncode == 0
    r = opentrans('data', 'check', 'coco_panoptic', '--root', tmp_path/'w', '--json')
    assert r.returncode == 0 and json.loads(r.stdout)['images'] == 3, r.stderr
    assert 'folder' in opentrans('data', 'list').stdout.split()

def test_cka_and_cost(mask, tmp_path):
    r = opentrans('cka', 'shapes-rn', '--mask', mask, '--images', 16, '--out', tmp_path/'c', '--json')
    assert r.returncode == 0, r.stderr
    assert {p.name for p in (tmp_path/'c').iterdir()} == {'cka.csv', 'cka.png'}
    r = json.loads(opentrans('cost', 'RN50', '--size', '224x224', '--json').stdout)
    assert r['params'] > 23e6

def test_demo(tmp_path):
    "`opentrans demo --out DIR` writes one page and one JSON file there."
    r = in_a_process('demo', '--scale', 'smoke', '--out', tmp_path/'d', '--workers', 2)
    assert r.returncode == 0, r.stderr
    assert sorted(p.suffix for p in (tmp_path/'d').iterdir()) == ['.html', '.json']
    data = json.loads((tmp_path/'d'/'opentrans-demo.json').read_text())
    assert len(data['results']) == 11 and {c['verdict'] for c in data['claims']} == {'one seed'}
    page = (tmp_path/'d'/'opentrans-demo.html').read_text()
    assert 'src="http' not in page and page.count('data:image/png') == 6

@pytest.mark.skipif(not coco.exists(), reason='the COCO panoptic sample images are not at ../shared/data/samples')
def test_real_coco_at_full_size(tmp_path):
    "RN50 at full size with random weights on real images: Algorithm 1, transfer, alpha, fine-tuning, evaluation."
    common = ('--backbone', 'RN50', '--pretrained', 'none', '--data', 'coco_panoptic', '--root', coco, '--batch-size', 1, '--device', 'cpu')
    r = opentrans('prune', *common, '--p', .7, '--iters', 1, '--crop', 224, '--out', tmp_path/'m.safetensors')
    assert r.returncode == 0, r.stderr
    r = opentrans('transfer', tmp_path/'m.safetensors', *common, '--recipe', 'paper', '--iterations', 1, '--warmup', 1, '--crop', 224, '--limit', 1, '--out', tmp_path/'t', '--json')
    assert r.returncode == 0, r.stderr
    res = json.loads(r.stdout)
    assert abs(res['density']-.1) < 5e-4 and len(res['iou']) == 133 and 0 < len(res['frozen']) <= 27      # half of the layers that have a fit; some of a random tower have none
