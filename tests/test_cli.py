"The command as a stranger types it: good input gives files and figures, bad input one sentence and exit code 2."
import contextlib, io, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from forked import python

root = Path(__file__).resolve().parent.parent
coco = root.parent/'shared'/'data'/'samples'/'coco_panoptic'

def in_a_process(*args):
    "The command in a process of its own, as a shell starts it."
    env = dict(os.environ, OMP_NUM_THREADS='1', OPENTRANS_PROGRESS='0')
    return subprocess.run([sys.executable, '-c', 'from opentrans.cli import main\nmain()', *map(str, args)],
                          capture_output=True, text=True, env=env, cwd=root)

def opentrans(*args):
    "The command in this process, which spares the start of torch each time."
    from opentrans.cli import main
    out = io.StringIO()
    err = io.StringIO()
    argv = sys.argv
    sys.argv = ['opentrans', *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): main()
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = argv
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

def fails(*args, code=2):
    "The one sentence of a command that must fail with exit code 2."
    r = opentrans(*args)
    assert r.returncode == code, (args, r.returncode, r.stdout[-500:], r.stderr[-2000:])
    assert 'Traceback' not in r.stderr
    lines = [line for line in r.stderr.splitlines() if line.startswith('error: ')]
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
    (folder/'images').mkdir()
    (folder/'labels').mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3),
                                     dtype=np.uint8)).save(folder/'images'/f's{i}.{"jpg" if i%2 else "png"}')
        Image.fromarray(rng.integers(0, 12, (60, 80), dtype=np.uint8)).save(folder/'labels'/f's{i}.png')
    return folder

@pytest.fixture
def small_looks(monkeypatch):
    "Images are seen at 64 pixels; at the released 800, which `test_evaluate_folder` has, it takes 100 times as long."
    monkeypatch.setattr('opentrans.training.released_size', lambda framework, data: dict(size=64, longest=128))

NAMES = 'sky,building,pole,road,pavement,tree,sign,fence,car,person,bicycle'

def test_usage_errors():
    r = in_a_process('nonsense')
    assert r.returncode == 2 and 'nonsense' in r.stderr and 'Traceback' not in r.stderr
    assert opentrans('prune').returncode == 2                                    # --out is missing
    assert opentrans('demo', '--seeds', 'many').returncode == 2

def test_bad_input_is_one_sentence(tmp_path, mask):
    out = tmp_path/'x.safetensors'
    assert 'density must be a number in (0, 1]' in fails('prune', '--density', '1.5', '--out', out)
    assert 'density must be a number in (0, 1]' in fails('prune', '--density', '0', '--method', 'random', '--out',
                                                         out)
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
    assert "Did you mean 'coco_panoptic'?" in fails('data', 'check', 'coco')
    assert '--seeds 0' in fails('demo', '--seeds', '0', '--out', tmp_path/'demo')
    assert "Unknown study 'tab1'" in fails('study', 'tab1', '--out', tmp_path/'study')
    # nothing half-written
    assert (sorted(p.name for p in tmp_path.iterdir()) == ['cut.safetensors', 'empty']
            and not list((tmp_path/'empty').iterdir()))

def test_evaluate_folder(streets, tmp_path):
    "What a user with own data types."
    r = opentrans('evaluate', '--data', 'folder', '--root', streets, '--classes', NAMES, '--ignore', 11,
                  '--framework', 'deeplabv3', '--backbone', 'shapes-rn', '--out', tmp_path/'out')
    assert r.returncode == 0, r.stderr
    res = json.loads((tmp_path/'out'/'result.json').read_text())
    assert (0 <= res['miou'] <= 1 and list(res['iou']) == NAMES.split(',') and res['n_images'] == 4
            and res['head'] == 'untrained')

def test_labels_outside_the_names(streets):
    # the void value is not named
    assert '11' in fails('evaluate', '--data', 'folder', '--root', streets, '--classes', NAMES)

def test_finetune_then_evaluate(streets, mask, tmp_path, small_looks):
    assert opentrans('alpha', 'shapes-rn', '--mask', mask, '--out', tmp_path/'alpha').returncode == 0
    r = opentrans('finetune', '--data', 'folder', '--root', streets, '--classes', NAMES, '--ignore', 11,
                  '--recipe', 'tiny', '--iterations', 3, '--batch-size', 2, '--mask', mask, '--selection',
                  tmp_path/'alpha'/'selection.json', '--out', tmp_path/'run')
    assert r.returncode == 0, r.stderr
    r = opentrans('evaluate', '--model', tmp_path/'run', '--data', 'folder', '--root', streets, '--classes', NAMES,
                  '--ignore', 11, '--json')
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)['head'] == 'trained'
    from opentrans.core import LayerSelection
    from opentrans.files import load_tensors
    from opentrans.clip import ClipBackbone
    from opentrans.pruning import SparseMask
    w = load_tensors(tmp_path/'run'/'model.safetensors')[0]
    m = SparseMask.load(mask)
    before = dict(ClipBackbone.create('shapes-rn', pretrained='shapes-rn').visual.named_parameters())
    frozen = set(LayerSelection.from_json(tmp_path/'alpha'/'selection.json').freeze)
    for n in m.names:
        after = w[f'backbone.visual.{n}']
        assert (after[~m[n]] == 0).all()
        # frozen layers rest, the others move
        assert (after[m[n]] == before[n].detach()[m[n]]).all() == (n in frozen), n

def test_transfer_on_shapes(mask, tmp_path):
    r = opentrans('transfer', mask, '--iterations', 2, '--warmup', 1, '--batch-size', 2, '--limit', 4, '--out',
                  tmp_path/'t')
    assert r.returncode == 0, r.stderr
    res = json.loads((tmp_path/'t'/'result.json').read_text())
    assert res['frozen'] and abs(res['density']-.1) < 5e-4 and set(res['groups']) == {'base', 'novel'}

def test_transfer_to_a_checkpoint(mask, tmp_path):
    "A mask on a state dict on disk, in OpenAI's names."
    from opentrans.clip import ClipBackbone
    from opentrans.files import load_tensors
    from opentrans.pruning import SparseMask
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    torch.save({f'visual.{k}': v for k,v in clip.visual.state_dict().items()} | {'logit_scale': torch.tensor(3.)},
               tmp_path/'model.pth')
    r = opentrans('transfer', mask, tmp_path/'model.pth', '--out', tmp_path/'sparse.safetensors')
    assert r.returncode == 0, r.stderr
    sd,m = load_tensors(tmp_path/'sparse.safetensors')[0],SparseMask.load(mask)
    for n in m.names:
        assert torch.equal(sd[f'visual.{n}'] != 0, m[n] & (dict(clip.visual.named_parameters())[n] != 0))
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

def test_cost_says_milliseconds_if_asked(mask):
    "`cost --clock` puts what the clock says beside the counts, for the mask that is given."
    found = json.loads(opentrans('cost', '--size', '64x64', '--mask', mask, '--clock', '--json').stdout)
    assert found['active_params'] < found['params']
    assert {'ms, torch', 'ms, ours'} <= found.keys() and all(v > 0 for k,v in found.items() if k.startswith('ms, '))
    assert 'opentrans speed --layers' in fails('cost', '--layers', '--clock')

def write_settings(path, **values):
    path.write_text(json.dumps(values))
    return path

def test_settings_from_a_file(streets, tmp_path, small_looks):
    "A file says what flags say; flags win; what was run with is kept, and is such a file again."
    (tmp_path/'run.yaml').write_text(f"""
        data: folder
        root: {streets}
        classes: ["{NAMES.replace(',', '", "')}"]
        ignore: 11
        batch-size: 2
        iterations: 9
        recipe: {{preset: tiny, optimizer: sgd, lr: 1e-3, crop: 48, scale: [0.5, 1.5]}}
        eval_every: 2
        eval_split: train
        seed: 3
    """.replace('\n        ', '\n'))
    r = opentrans('finetune', '--config', tmp_path/'run.yaml', '--iterations', 2, '--out', tmp_path/'a', '--set',
                  'flip=0', '--json')
    assert r.returncode == 0, r.stderr
    kept = json.loads((tmp_path/'a'/'settings.json').read_text())
    told = kept['recipe']
    assert (told['iterations'], told['optimizer'], told['lr'], told['batch_size'], told['seed'], told['flip'],
            told['scale']) == (2, 'sgd', .001, 2, 3, 0, [.5, 1.5])
    assert (kept['command'] == 'finetune' and kept['iterations'] == 2 and 'settings: ' in r.stderr
            and '"optimizer": "sgd"' in r.stderr)
    done = json.loads(r.stdout)
    # the same weights, judged in the same way
    assert done['best_miou'] == done['miou'] and (tmp_path/'a'/'run'/'best.safetensors').exists()
    r = opentrans('finetune', '--config', tmp_path/'a'/'settings.json', '--out', tmp_path/'b')
    assert r.returncode == 0, r.stderr
    assert (tmp_path/'a'/'run'/'history.csv').read_text() == (
        tmp_path/'b'/'run'/'history.csv').read_text(), 'what was kept is another run'
    assert json.loads((tmp_path/'a'/'model.json').read_text())['recipe'] == told

def test_settings_that_are_none(tmp_path):
    assert (
        "Unknown setting in" in (m := fails('evaluate', '--config',
                                            write_settings(tmp_path/'a.json', batchsize=3)))
        and "Did you mean 'batch_size'?" in m and 'framework' in m)
    assert 'not of `opentrans cost`' in fails('cost', '--config',
                                              write_settings(tmp_path/'b.json', command='evaluate'))
    assert 'is not JSON' in fails('alpha', '--config', write_text(tmp_path/'c.json', '{'))
    assert 'Cannot read' in fails('alpha', '--config', tmp_path/'none.yaml')
    assert "Unknown setting of a recipe 'rate'" in fails('finetune', '--out', tmp_path/'o', '--set', 'rate=1')
    assert 'expected a whole number' in fails('finetune', '--out', tmp_path/'o', '--config',
                                              write_settings(tmp_path/'d.json',
                                                             recipe=dict(preset='tiny', crop='big')))
    assert ('NAME=VALUE' in fails('finetune', '--out', tmp_path/'o', '--set', 'lr')
            and "Unknown recipe 'small'" in fails('finetune', '--out', tmp_path/'o', '--recipe', 'small'))
    r = opentrans('evaluate', '--config', write_settings(tmp_path/'e.json', batch_size='many'))
    assert r.returncode == 2 and 'batch-size' in r.stderr and not (tmp_path/'o').exists()

def write_text(path, text):
    path.write_text(text)
    return path

@pytest.mark.parametrize('args', [(), ('data',)])
def test_every_command_takes_a_file(args):
    "Whatever can be typed can be written down."
    from opentrans.cli import app, data_app
    for c in (data_app if args else app).registered_commands:
        name = c.name or c.callback.__name__.replace('_', '-')
        r = opentrans(*args, name, '--help')
        assert r.returncode == 0 and '--config' in r.stdout, name

@pytest.fixture(scope='module')
def odd_streets(tmp_path_factory):
    """Street scenes of 480x360 as a stranger's disk holds them: jpg and png, blanks, dots, accents and upper case
    in names, sub-folders, a photo that its camera turned, other files beside."""
    folder,rng = tmp_path_factory.mktemp('odd streets'),np.random.default_rng(1)
    for i,name in enumerate(('Seq05VD_f00000.png', 'night/a b.c.jpg', 'Straße 7.JPG', 'turned.jpeg', 'x.png')):
        labels = rng.integers(0, 12, (6, 8)).repeat(60, 0).repeat(60, 1).astype(np.uint8)
        image = Image.fromarray((np.stack([labels*20, labels*9, 255-labels*20], -1)
                                 + rng.integers(0, 9, (360, 480, 3))).astype(np.uint8))
        for kind in ('images', 'labels'): (folder/kind/name).parent.mkdir(parents=True, exist_ok=True)
        if 'turned' in name:
            exif = Image.Exif()
            exif[274] = 8
            image = image.rotate(-90, expand=True)
            image.save(folder/'images'/name, exif=exif)
        else: image.save(folder/'images'/name)
        Image.fromarray(labels).save((folder/'labels'/name).with_suffix('.png'))
    (folder/'images'/'.DS_Store').write_text('')
    (folder/'images'/'Thumbs.db').write_text('')
    (folder/'classes.txt').write_text('\n'.join(NAMES.split(',')))
    return folder

def test_a_folder_never_seen(odd_streets, tmp_path, small_looks):
    """What the checks type: names on the command line, a void value, then training on it, and the figures of both
    in one table."""
    common = ('--data', 'folder', '--root', odd_streets, '--classes', NAMES, '--ignore', 11, '--device', 'cpu')
    r = opentrans('data', 'check', 'folder', *common[2:-2], '--json')
    assert r.returncode == 0, r.stderr
    assert (d := json.loads(r.stdout))['images'] == 5 and d['sizes'] == '480x360' and d['problems'] == 0
    r = opentrans('evaluate', *common, '--framework', 'deeplabv3', '--backbone', 'shapes-rn', '--limit', 2,
                  '--out', tmp_path/'zero')
    assert r.returncode == 0, r.stderr
    r = opentrans('finetune', *common, '--out', tmp_path/'run', '--iterations', 3, '--batch-size', 2, '--crop', 96,
                  '--print-every', 1)
    assert r.returncode == 0 and 'iteration 3/3' in r.stderr and 'left' in r.stderr, r.stderr
    looks = ('--short-side', 120, '--scales', '0.5,1', '--flip', '--window', 80)
    r = opentrans('evaluate', *common[:4], '--classes', odd_streets/'classes.txt', *common[6:], '--model',
                  tmp_path/'run', '--limit', 2, *looks, '--out', tmp_path/'tuned')
    assert r.returncode == 0, r.stderr
    res = json.loads((tmp_path/'tuned'/'result.json').read_text())
    assert (list(res['iou']) == NAMES.split(',') and res['settings']['scales'] == [.5, 1]
            and res['settings']['window'] == 80 and res['n_images'] == 2)
    r = opentrans('compare', tmp_path/'zero', tmp_path/'tuned', '--out', tmp_path/'c', '--json')
    assert r.returncode == 0, r.stderr
    assert (json.loads(r.stdout)['tuned']['miou'] == res['miou']
            and {p.name for p in (tmp_path/'c').iterdir()} == {'runs.csv', 'runs.png'})
    assert 'There is no result' in fails('compare', tmp_path)

def test_a_package_of_ones_own_has_the_command(tmp_path):
    "As the tutorial on frameworks says: what a package registers is known to `python -m` of it."
    package = tmp_path/'my_package'
    package.mkdir()
    (package/'__init__.py').write_text(
        "from opentrans.data import register_dataset\n"
        "from opentrans.frameworks import register_framework\n"
        "register_framework('mine', module='my_package.mine')\n"
        "@register_dataset('my tiles', 'Make them.')\n"
        "def tiles(root, split='val'): raise NotImplementedError\n")
    (package/'__main__.py').write_text("from opentrans.cli import main\nif __name__ == '__main__': main()\n")
    (package/'mine.py').write_text(
        "from torch import nn\n"
        "from opentrans.frameworks import Framework, register_framework, resize, text_logits\n"
        "@register_framework('mine')\n"
        "class Mine(Framework):\n"
        "    def __init__(self, backbone, vocabulary=None):\n"
        "        super().__init__(backbone, vocabulary)\n"
        "        self.proj = nn.Conv2d(backbone.channels['res5'], backbone.embed_dim, 1)\n"
        "    def forward(self, images, text):\n"
        "        found = text_logits(self.proj(self.backbone(images)['res5']), text)\n"
        "        return resize(found, images.shape[-2:])\n")
    where = os.pathsep.join([str(tmp_path), *sys.path])
    def run(*words):
        command = [sys.executable, '-m', 'my_package', *words]
        r = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': where})
        assert r.returncode == 0, r.stderr
        return json.loads(r.stdout)
    assert 'my tiles' in run('data', 'list', '--json')
    cost = ('shapes-rn', '--size', '64x64', '--json')
    assert run('cost', *cost, '--framework', 'mine')['params'] > 10**6

def test_data_check_counts_images_alone(tmp_path):
    "A finding about all images is no image; a file of names in YAML is no name."
    for folder in ('images', 'labels'): (tmp_path/folder).mkdir()
    for i in range(3):
        Image.new('RGB', (8, 6)).save(tmp_path/'images'/f'{i}.png')
        Image.fromarray(np.where(np.arange(48).reshape(6, 8) % 2, 255, 0).astype(np.uint8)).save(
            tmp_path/'labels'/f'{i}.png')
    (tmp_path/'classes.yaml').write_text('names:\n  0: background\n  1: coin\n')
    r = opentrans('data', 'check', 'folder', '--root', tmp_path, '--classes', tmp_path/'classes.yaml', '--json')
    told = json.loads(r.stdout)
    assert r.returncode == 1 and (told['images'], told['images_read'], told['classes']) == (3, 3, 2)
    assert "'coin' never occurs" in told['list']['all images']
    (tmp_path/'my.classes').write_text('background\ncoin\n')
    r = opentrans('data', 'check', 'folder', '--root', tmp_path, '--classes', tmp_path/'my.classes', '--json')
    assert json.loads(r.stdout)['classes'] == 2

def test_data_check_tells_what_is_broken(streets, tmp_path, small_looks):
    import shutil
    shutil.copytree(streets, tmp_path/'d')
    common = ('--classes', NAMES, '--ignore', 11)
    (tmp_path/'d'/'images'/'s1.jpg').write_bytes(b'not a picture')
    r = opentrans('data', 'check', 'folder', '--root', tmp_path/'d', *common)
    assert r.returncode == 1 and 's1' in r.stdout and 'cannot be read' in r.stdout
    assert 's1.jpg' in fails('evaluate', '--data', 'folder', '--root', tmp_path/'d', *common)
    with pytest.warns(UserWarning, match='1 of 4 images are left out'):
        r = opentrans('evaluate', '--data', 'folder', '--root', tmp_path/'d', *common, '--corrupt', 'skip',
                      '--json')
    assert r.returncode == 0 and json.loads(r.stdout)['n_images'] == 3
    (tmp_path/'d'/'labels'/'s2.png').unlink()
    assert "no label map for 's2" in fails('data', 'check', 'folder', '--root', tmp_path/'d', *common)
    # the wrong root
    assert 'missing: images, labels' in fails('evaluate', '--data', 'folder', '--root', tmp_path, *common)

@pytest.mark.skipif(os.name != 'posix', reason='needs a limit on file sizes')
def test_full_disk_by_command(tmp_path):
    """The disk is full when the checkpoint is written: one sentence, exit code 1 (nothing the user typed is wrong),
    and the checkpoint of before is as it was."""
    import resource, signal
    before = opentrans('finetune', '--out', tmp_path, '--iterations', 2, '--batch-size', 1, '--checkpoint-every', 1)
    assert before.returncode == 0, before.stderr
    (tmp_path/'model.safetensors').unlink()
    last = (tmp_path/'run'/'last.safetensors').read_bytes()
    old,handler = resource.getrlimit(resource.RLIMIT_FSIZE),signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, old[1]))
    try:
        message = fails('finetune', '--out', tmp_path, '--iterations', 2, '--batch-size', 1, '--checkpoint-every',
                        1, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert 'Cannot write' in message and 'model.safetensors' in message
    assert ((tmp_path/'run'/'last.safetensors').read_bytes() == last
            and not list(tmp_path.glob('.*'))), 'something half-written was left'
    assert (opentrans('finetune', '--out', tmp_path, '--iterations', 2, '--batch-size', 1).returncode == 0
            and (tmp_path/'model.safetensors').exists())

def test_transfer_takes_a_number_for_the_tail(mask, tmp_path):
    "`--xmin` is the same for `alpha` and `transfer`."
    r = opentrans('transfer', mask, '--iterations', 1, '--warmup', 0, '--batch-size', 1, '--limit', 1, '--xmin',
                  '0.05', '--out', tmp_path/'t', '--json')
    assert r.returncode == 0 and json.loads(r.stdout)['frozen'], r.stderr
    assert 'xmin' in fails('transfer', mask, '--iterations', 1, '--warmup', 0, '--batch-size', 1, '--xmin', 'low')

def test_module_is_a_program():
    r = python('-m', 'opentrans.cli', 'data', 'list', '--json', cwd=root)
    assert r.returncode == 0 and 'folder' in json.loads(r.stdout), r.stderr

def test_demo(tmp_path):
    "`opentrans demo --out DIR` writes one page and one JSON file there."
    r = opentrans('demo', '--scale', 'smoke', '--out', tmp_path/'d')
    assert r.returncode == 0, r.stderr
    assert sorted(p.suffix for p in (tmp_path/'d').iterdir()) == ['.html', '.json']
    data = json.loads((tmp_path/'d'/'opentrans-demo.json').read_text())
    assert (len(data['results']) == 8
            and {r['framework'] for r in data['results']} == {'deeplabv3', 'fcclip'}
            and {row['engine'] for row in data['clock']} >= {'torch', 'sparse engine'}
            and {c['verdict'] for c in data['claims']} == {'one seed'})
    page = (tmp_path/'d'/'opentrans-demo.html').read_text()
    assert 'src="http' not in page and page.count('data:image/png') == 8 # one is of photographs

@pytest.mark.skipif(not coco.exists(), reason='the COCO panoptic sample images are not at ../shared/data/samples')
@pytest.mark.slow
def test_real_coco_at_full_size(tmp_path):
    "RN50 at full size with random weights on real images: Algorithm 1, transfer, alpha, fine-tuning, evaluation."
    common = ('--backbone', 'RN50', '--pretrained', 'none', '--data', 'coco_panoptic', '--root', coco,
              '--batch-size', 1, '--device', 'cpu')
    r = opentrans('prune', *common, '--p', .7, '--iters', 1, '--crop', 224, '--out', tmp_path/'m.safetensors')
    assert r.returncode == 0, r.stderr
    r = opentrans('transfer', tmp_path/'m.safetensors', *common, '--iterations', 2, '--warmup', 1, '--crop', 224,
                  '--limit', 1, '--out', tmp_path/'t', '--json')
    assert r.returncode == 0, r.stderr
    res = json.loads(r.stdout)
    # half of the layers that have a fit; some of a random tower have none
    assert abs(res['density']-.1) < 5e-4 and len(res['iou']) == 133 and 0 < len(res['frozen']) <= 27

def test_a_study(tmp_path):
    """`opentrans study` lists what there is; a study of two seeds writes its file, and a second call repeats
    nothing."""
    r = opentrans('study')
    assert r.returncode == 0 and all(n in r.stdout for n in ('frameworks', 'freezing', 'ratio', 'Tab. 10'))
    made = []
    for _ in range(2):
        r = opentrans('study', 'ratio', '--seeds', 2, '--scale', 'smoke', '--out', tmp_path)
        assert r.returncode == 0, r.stderr
        made.append({p: p.stat().st_mtime_ns for p in (tmp_path/'.runs').rglob('arm-*.json')})
    data = json.loads((tmp_path/'ratio-smoke-2seeds.json').read_text())
    assert data['run']['command'] == 'opentrans study ratio --seeds 2 --scale smoke'
    assert ([len(x['frozen']) for x in data['results'][:4]] == sorted(len(x['frozen'])
                                                                      for x in data['results'][:4])
            and len(data['results']) == 8)
    # the second call has only read them
    assert len(made[0]) == 8 and made[0] == made[1]

def test_numbers_that_make_no_sense(mask):
    "Refused before anything is loaded; a mask of another backbone before anything is counted."
    for bad in (('evaluate', '--limit', -1), ('evaluate', '--batch-size', 0), ('evaluate', '--window', -8),
                ('data', 'shapes', '--out', 'x', '--seed', -1), ('study', 'ratio', '--workers', -2)):
        r = opentrans(*bad)
        assert r.returncode == 2 and 'Traceback' not in r.stderr, (bad, r.stderr[-300:])
    assert 'above 0' in fails('evaluate', '--scales', '0,1')
    assert opentrans('cka', '--size', 3).returncode == 2
    fails('cost', 'RN50', '--mask', mask)

def test_segment_an_own_image(tmp_path):
    "From a trained model to a picture of one image; bad input leaves nothing behind."
    for a in (('data', 'shapes', '--out', tmp_path/'scenes', '--n', 1),
              ('finetune', '--iterations', 2, '--batch-size', 2, '--out', tmp_path/'run')):
        assert opentrans(*a).returncode == 0
    # another course than the one that lies there
    fails('finetune', '--iterations', 1, '--batch-size', 2, '--out', tmp_path/'run')
    assert json.loads((tmp_path/'run'/'settings.json').read_text())['iterations'] == 2
    photo = next((tmp_path/'scenes'/'coco'/'val2017').iterdir())
    r = opentrans('segment', photo, 'grass, water | sea', '--model', tmp_path/'run', '--out',
                  tmp_path/'new'/'seen.jpg', '--json')
    assert (r.returncode == 0 and set(json.loads(r.stdout)) == {'grass', 'water'}
            and Image.open(tmp_path/'new'/'seen.jpg').format == 'JPEG')
    assert 'no trained model' in fails('segment', photo, 'grass', '--model', tmp_path/'nothing', '--out',
                                       tmp_path/'a.png')
    assert 'picture ends in' in fails('segment', photo, 'grass', '--out', tmp_path/'a.gif')
    assert 'not an image' in fails('segment', tmp_path/'run'/'model.json', 'grass', '--out', tmp_path/'a.png')
    assert opentrans('segment', photo, 'grass', '--max-side', 0, '--out', tmp_path/'a.png').returncode == 2
    (tmp_path/'half').mkdir()
    (tmp_path/'half'/'model.json').write_text('{"framework": "deeplabv3"}')
    assert 'does not say: backbone' in fails('segment', photo, 'grass', '--model', tmp_path/'half', '--out',
                                             tmp_path/'a.png')
    assert not list(tmp_path.glob('a.*'))

def test_what_cannot_end_well_does_not_begin(tmp_path, mask):
    "Places that cannot be written to, and rules that are not known, are said before anything is trained."
    taken = tmp_path/'taken'
    taken.write_text('mine')
    for args in (('prune', '--out', tmp_path/'m.safetensors', '--weights', taken/'w.safetensors'),
                 ('prune', '--out', taken/'m.safetensors'), ('finetune', '--out', taken),
                 ('study', 'losses', '--out', taken), ('demo', '--out', taken)):
        assert 'Not a directory' in fails(*args)
    assert taken.read_text() == 'mine' and [*tmp_path.iterdir()] == [taken]
    for command in (('alpha',), ('transfer', mask)):
        assert ('alpha*' in fails(*command, '--by', 'foo') and 'median' in fails(*command, '--xmin', 'foo')
                and opentrans(*command, '--freeze', 3).returncode == 2)
    assert opentrans('prune', '--out', tmp_path/'m.safetensors', '--crop', -1).returncode == 2

def test_small_things_of_the_command(tmp_path):
    "The version, JSON of a baseline, and no log of torch's before an error."
    import opentrans as package
    assert package.__version__ in opentrans('--version').stdout
    table = json.loads(opentrans('prune', '--method', 'magnitude', '--out', tmp_path/'m.safetensors',
                                 '--json').stdout)
    assert len(table) > 5 and all(0 <= r['density'] <= 1 for r in table.values())
    r = python('-m', 'opentrans.cli', 'cost', '--size', '8x8', env=dict(os.environ, OPENTRANS_PROGRESS='0'), cwd=root)
    assert r.returncode == 2 and len(r.stderr.splitlines()) == 1, r.stderr

def test_a_criterion_of_the_library_is_one_of_the_command(tmp_path):
    """One contract of criteria: the name that `SparseMask.by` and `imp` take is taken by `prune`, in one shot and
    in rounds."""
    from opentrans.pruning import SparseMask
    small = ('--batch-size', 2, '--score-batches', 2)
    assert opentrans('prune', '--method', 'snip', '--out', tmp_path/'shot.safetensors', *small).returncode == 0
    rounds = ('--criterion', 'sensitivity', '--iters', 1, '--density', .5, '--drop', .5)
    assert opentrans('prune', *rounds, '--out', tmp_path/'rounds.safetensors', *small).returncode == 0
    shot, found = SparseMask.load(tmp_path/'shot.safetensors'), SparseMask.load(tmp_path/'rounds.safetensors')
    assert shot.info['method'] == 'snip' and abs(shot.density-.1) < 1e-3
    assert found.info['criterion'] == 'sensitivity' and abs(found.density-.5) < 1e-3
    assert 'magnitude, snip' in fails('prune', '--criterion', 'luck', '--out', tmp_path/'m.safetensors')
    assert 'one shot' in fails('prune', '--method', 'snip', '--criterion', 'snip', '--out',
                               tmp_path/'m.safetensors')

def test_a_mask_layer_by_layer(tmp_path):
    "The methods of `reconstruct`, with their flags; other methods do not read these."
    from opentrans.pruning import SparseMask
    few = ('--images', 4, '--batch-size', 2, '--density', .3)
    for method,more in (('wanda', ()), ('sparsegpt', ('--densities', 'owl'))):
        made = opentrans('prune', '--method', method, '--out', tmp_path/f'{method}.safetensors', *few, *more,
                         '--weights', tmp_path/'clip.safetensors')
        assert made.returncode == 0, made.stderr
        mask = SparseMask.load(tmp_path/f'{method}.safetensors')
        assert mask.info['method'] == method and mask.info['images'] == 4 and abs(mask.density-.3) < 5e-3
    assert (tmp_path/'clip.safetensors').exists()
    opentrans('prune', '--method', 'wanda', '--scope', '2:4', '--density', .5, '--out', tmp_path/'n.safetensors',
              '--images', 2)
    assert SparseMask.load(tmp_path/'n.safetensors').info['scope'] == '2:4'
    assert '--images' in fails('prune', '--method', 'snip', '--images', 4, '--out', tmp_path/'m.safetensors')

def test_finetune_lengthens_its_run_and_transfer_does_not(tmp_path):
    "The same command with more iterations; in `transfer` a longer warm-up would be another run."
    small = ('--batch-size', 2, '--eval-limit', 2)
    for iterations in (4, 8):
        r = opentrans('finetune', '--out', tmp_path/'run', '--iterations', iterations, *small)
        assert r.returncode == 0, r.stderr
    assert len((tmp_path/'run/run/history.csv').read_text().splitlines()) == 9
    small = ('--dense', '--freeze', 0.5, '--batch-size', 2, '--limit', 2, '--out', tmp_path/'moved')
    assert opentrans('transfer', *small, '--iterations', 4, '--warmup', 2).returncode == 0
    before = (tmp_path/'moved/warmup/last.safetensors').read_bytes()
    assert 'other settings' in fails('transfer', *small, '--iterations', 4, '--warmup', 3)
    assert (tmp_path/'moved/warmup/last.safetensors').read_bytes() == before

def test_densities_of_layers_for_masks_by_weights(tmp_path):
    from opentrans.clip import ClipBackbone
    from opentrans.pruning import layer_densities, SparseMask
    out = tmp_path/'m.safetensors'
    assert opentrans('prune', '--method', 'magnitude', '--densities', 'alpha', '--out', out).returncode == 0
    shares = layer_densities('alpha', ClipBackbone.create('shapes-rn', pretrained='shapes-rn'), .1)
    mask = SparseMask.load(out)
    assert all(abs(float(mask[name].float().mean())-share) < .01 for name,share in shares.items())
    assert 'looks at images' in fails('prune', '--method', 'magnitude', '--densities', 'owl', '--out', out)
    assert 'measured anew' in fails('prune', '--densities', 'clock', '--out', out)
    assert 'does not look at --densities' in fails('prune', '--method', 'random', '--densities', 'alpha', '--out', out)

def test_a_study_tells_its_jobs_in_a_log(capsys, monkeypatch):
    "Where no bar can be shown, a line is written for each job that is done."
    from opentrans.experiments import run_jobs
    monkeypatch.delenv('OPENTRANS_PROGRESS', raising=False)
    monkeypatch.delenv('IN_TEST', raising=False)
    jobs = {(0, 'arm', 'b'): ([(0, 'arm', 'a')], abs, (-2,)), (0, 'arm', 'a'): ([], abs, (-1,))}
    assert run_jobs(jobs, 1, 'seed 0') == {(0, 'arm', 'a'): 1, (0, 'arm', 'b'): 2}
    if 'ipykernel' not in sys.modules:
        assert capsys.readouterr().err.splitlines() == ['seed 0: 1 of 2 done, 0 arm a',
                                                        'seed 0: 2 of 2 done, 0 arm b']

class Begun(BaseException):
    "The flags were accepted, and the work has begun."

@pytest.fixture
def no_work(monkeypatch):
    "The first picture that goes through a tower, the first spectrum, job or scene ends a command."
    from opentrans import data, experiments, heavy_tail
    from opentrans.towers import ResNetTower
    features = ResNetTower.features
    def look(net, x):
        if type(x) is torch.Tensor and x.device.type != 'meta' and x.any(): raise Begun
        return features(net, x)
    def begin(*args, **kwargs): raise Begun
    monkeypatch.setattr(ResNetTower, 'features', staticmethod(look))
    monkeypatch.setattr(heavy_tail, 'analyze', begin)
    for module in (experiments.jobs, experiments.registry, experiments.studies):
        monkeypatch.setattr(module, 'run_jobs', begin)
    monkeypatch.setattr(data, 'write_coco_panoptic', begin)

def numeric_options():
    "Every option of every command that takes a number: (words of the command, option, is it whole?)."
    from typing import get_args, get_type_hints
    from opentrans.cli import app, data_app
    for path,group in (((), app), (('data',), data_app)):
        for command in group.registered_commands:
            words = (*path, command.name or command.callback.__name__)
            for name,kind in get_type_hints(command.callback).items():
                kinds = {kind, *get_args(kind)} & {int, float}
                if kinds: yield words, '--' + name.replace('_', '-'), int in kinds

def arguments(command, mask, folder):
    "What a command needs besides, so that it would run."
    few = ('--iterations', 2, '--batch-size', 2)
    return {'prune': ('--out', folder/'m.safetensors', '--iters', 1), 'transfer': (mask, *few),
            'finetune': ('--out', folder/'run', *few), 'study': ('ratio', '--scale', 'smoke', '--out', folder/'s'),
            'demo': ('--scale', 'smoke', '--out', folder/'d'), 'segment': (folder/'p.png', 'sky'),
            'data check': ('shapesworld',), 'data shapes': ('--out', folder/'w'),
            'cka': ('--mask', mask)}.get(' '.join(command), ())

NEVER = ('nan', 'inf', '-inf', '1e400', 'text', '', ' ', '-1', '1,2', '1'*5000)
MAY_BE_ZERO = {'--seed', '--freeze', '--crop', '--warmup', '--print-every', '--eval-every', '--workers', '--lr',
               '--weight-decay', '--clip-grad', '--eval-limit'}
OFF = {'--checkpoint-every', '--disk-mb'} # of prune, where 0 leaves something out

@pytest.mark.parametrize('command', sorted({c for c,_,_ in numeric_options()}), ids=' '.join)
def test_no_number_ends_in_a_traceback(command, mask, tmp_path, no_work):
    """Every option that takes a number, with numbers that make no sense: refused in one sentence before anything
    begins, and nothing is written."""
    Image.new('RGB', (32, 32)).save(tmp_path/'p.png')
    for option,whole in [(o, w) for c,o,w in numeric_options() if c == command]:
        refused = (NEVER + (('1.5', '1'+'0'*30, str(2**64)) if whole else ())
                   + (() if option in MAY_BE_ZERO or command == ('data', 'check')
                      or (command == ('prune',) and option in OFF) else ('0',)))
        for value in refused:
            try: r = opentrans(*command, *arguments(command, mask, tmp_path), option, value)
            except Begun: pytest.fail(f"{' '.join(command)} {option} {value[:40]!r} was accepted")
            assert (r.returncode == 2 and 'Traceback' not in r.stderr), (
                command, option, value[:40], r.returncode, r.stderr[-600:])
    assert [p.name for p in tmp_path.iterdir()] == ['p.png']

def test_a_dry_run_of_a_study_writes_nothing(tmp_path):
    "It says what a run needs, framework by framework."
    r = opentrans('study', 'ratio', '--scale', 'smoke', '--seeds', 2, '--out', tmp_path/'o', '--dry-run')
    assert r.returncode == 0 and 'deeplabv3' in r.stdout and not (tmp_path/'o').exists(), r.stderr

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "The seven data sets of Table 1 under one folder, with one or two small scenes each."
    import fake_datasets as fake
    root = tmp_path_factory.mktemp('datasets')
    fake.make_coco(root, 'train', 3, width=96, height=64)
    fake.make_coco(root, 'val', 2, seed=3, width=96, height=64)
    for name,(images, labels, _, void, suffix) in list(fake.LABEL_MAPS.items()):
        fake.LABEL_MAPS[name] = (images, labels, (80, 64), void, suffix)
        fake.make_label_maps(root, name, 1)
    fake.make_cityscapes(root, 1)
    for file in root.glob('cityscapes/**/*.png'):
        with Image.open(file) as picture: small = picture.resize((128, 64), Image.NEAREST)
        small.save(file)
    return root

def course(*args, **more):
    "Preset, whole course, warm-up and rest, as the command divides them."
    from opentrans.cli.defaults import _course
    return _course(*args, **dict(dict(warmup=None, freeze=.5), **more))

def test_the_papers_course_is_the_default():
    """Warm-up and rest are the beginning and the end of one course of the paper's length; one flag shortens both;
    tiny stays as it was."""
    from opentrans.training import Recipe
    for framework,total in dict(deeplabv3=50_000, mask2former=50_000, fcclip=368_750, faseg=160_000).items():
        for name in (None, 'paper', 'released'):
            preset,whole,warm,rest = course(name, framework, shipped=False)
            assert (preset == (name or 'paper') and whole == getattr(Recipe, preset)(framework)
                    and whole.iterations == total)
            assert (warm.iterations, rest.offset, rest.iterations) == (10_000, 10_000, total-10_000)
            assert whole.lr_warmup == 0, 'the factor of the warm-up is constant, as released'
            assert whole.crop == (1024 if framework == 'fcclip' else 512)
            assert [rest.lr_at(i) for i in (0, rest.iterations-1)] == [whole.lr_at(i) for i in (10_000, total-1)]
    _,whole,warm,rest = course('paper', 'mask2former', shipped=True, iterations=500)
    assert (warm.iterations, rest.iterations, rest.milestones) == (100, 400, (400, 450))
    assert course(None, 'deeplabv3', shipped=False,
                  freeze=0)[2] is None, 'where no layer is chosen the course is in one piece'
    assert course(None, 'deeplabv3', shipped=False, iterations=500, warmup=30)[2].iterations == 30
    preset,whole,warm,rest = course(None, 'deeplabv3', shipped=True)
    assert (preset == 'tiny' and rest == whole == Recipe.tiny()
            and warm == Recipe.tiny().shorten(60).replace(schedule='constant'))
    from opentrans.errors import OpenTransError
    with pytest.raises(OpenTransError, match='leaves none'):
        course('paper', 'deeplabv3', shipped=False, iterations=9, warmup=9)

def test_stride_and_prompts_are_the_released_ones():
    "Stride 16 for DeepLabV3 on a ResNet alone; bare names, and FC-CLIP's own prompts."
    from opentrans.cli.defaults import _looks, _stride, is_shipped
    from opentrans.frameworks import get_framework
    built = ('deeplabv3', 'RN50'), ('mask2former', 'RN50'), ('fcclip', 'RN50'), ('deeplabv3', 'convnext_base')
    assert [_stride(None, *names, False) for names in built] == [16, 32, 32, 32]
    assert ([_stride(None, 'fpn', b, True) for b in ('shapes-rn', 'shapes-vit')] == [16, 32]
            and _stride(8, 'fpn', 'RN50', False) == 8)
    assert is_shipped('shapes-rn', 'shapesworld')
    assert not is_shipped('RN50', 'shapesworld') and not is_shipped('shapes-rn', 'folder')
    assert [get_framework(name).prompts for name in ('mask2former', 'deeplabv3', 'fcclip')] == ['{}', '{}', 'vild']
    assert _looks('fcclip', 'cityscapes_19', False, device='cpu') == dict(
        size=1024, longest=2560, over='truth', workers=0)
    assert _looks('deeplabv3', 'shapesworld', True, device='cpu') == dict(over='either', workers=0)

@pytest.fixture(scope='module')
def transferred(tree, mask, tmp_path_factory):
    "A run of `transfer` on COCO with every default of the paper, shortened by one flag: (folder, what was said)."
    out = tmp_path_factory.mktemp('run')/'run'
    few = ('--iterations', 20, '--batch-size', 2, '--crop', 64)
    r = opentrans('transfer', mask, '--framework', 'fcclip', '--data', 'coco_panoptic', '--root', tree, *few,
                  '--out', out, '--json')
    assert r.returncode == 0, r.stderr[-2000:]
    return out,r

def test_a_transferred_model_is_a_model(transferred, tree, mask, tmp_path):
    "What `transfer` leaves is opened, measured on the seven data sets in one row, and asked about a picture."
    out,r = transferred
    for said in ('recipe: paper of fcclip', '1 with all layers and no mask, then 19', 'stride 32, prompts'):
        assert said in r.stderr
    left = {'model.json', 'model.safetensors', 'selection.json', 'result.json', 'settings.json', 'warmup',
            'finetune'}
    assert left <= {p.name for p in out.iterdir()}
    told,result = (json.loads((out/name).read_text()) for name in ('model.json', 'result.json'))
    assert (told['framework'], told['recipe']['iterations'], told['recipe']['optimizer']) == ('fcclip', 20, 'adamw')
    assert len(told['classes']) == 133 and abs(result['density']-.1) < 5e-4
    assert result['settings'] | dict(over='truth', size=800, longest=1333) == result['settings']
    from opentrans.cli import open_trained
    from opentrans.data import Vocabulary
    seg,_,name = open_trained(out, Vocabulary(['sky', 'road']))
    assert name == 'fcclip' and list(seg.vocabulary.names) == told['classes']
    assert seg.text(['zebra', 'spaceship']).seen.tolist() == [True, False]
    r = opentrans('evaluate', '--model', out, '--data', 'all', '--root', tree, '--short-side', 48, '--out',
                  tmp_path/'all')
    assert r.returncode == 0, r.stderr[-2000:]
    table = json.loads((tmp_path/'all'/'result.json').read_text())
    assert json.loads((tmp_path/'all'/'settings.json').read_text())['framework'] == 'fcclip'
    columns = ['coco_panoptic', 'cityscapes_19', 'ade20k_150', 'ade20k_847', 'voc_20', 'context_59', 'context_459']
    assert list(table['table']) == list(table['results']) == columns and table['settings']['over'] == 'truth'
    assert table['active_params'] < table['params'] and abs(table['density']-.1) < .01
    assert [len(x['iou']) for x in table['results'].values()] == [133, 19, 150, 847, 20, 59, 459]
    assert all(c in r.stdout for c in columns) and len(r.stderr.split('mIoU')) == 8
    assert 'mean over the classes in the truth' in ' '.join(r.stdout.split())
    assert opentrans('compare', tmp_path/'all', out, '--json').returncode == 0
    photo = next((tree/'coco'/'val2017').iterdir())
    r = opentrans('segment', photo, 'sky, road', '--model', out, '--out', tmp_path/'seen.png', '--json')
    assert r.returncode == 0 and set(json.loads(r.stdout)) <= {'sky', 'road'}, r.stderr

def test_a_missing_data_set_is_said_before_anything_runs(transferred, tree, tmp_path, no_work):
    "Two of the seven are not there: one sentence names both, and how to get the first."
    import shutil
    shutil.copytree(tree, tmp_path/'few')
    for folder in ('ADE20K_2021_17_01', 'pascal_voc_d2'): shutil.rmtree(tmp_path/'few'/folder)
    message = fails('evaluate', '--model', transferred[0], '--data', 'all', '--root', tmp_path/'few', '--out',
                    tmp_path/'o')
    assert 'ade20k_847, voc_20 cannot be opened' in message and 'ADE20K' in message and not (tmp_path/'o').exists()
    assert 'leave out --classes' in fails('evaluate', '--data', 'all', '--classes', 'a,b')
    assert 'leave out --kind' in fails('evaluate', '--data', 'all', '--kind', 'panoptic')
    assert 'leave out --short-side' in fails('evaluate', '--own-size', '--short-side', 64)

def test_rows_without_a_mask(tmp_path, mask):
    "Table 2: dense, by alpha, by large alpha, at random; and what cannot be a row."
    few = ('--iterations', 1, '--warmup', 1, '--batch-size', 1, '--limit', 1)
    frozen = {}
    for by in ('alpha', 'alpha*', 'random'):
        r = opentrans('transfer', '--dense', *few, '--by', by, '--out', tmp_path/by, '--json')
        assert r.returncode == 0, r.stderr
        told = json.loads(r.stdout)
        frozen[by] = {*told['frozen']}
        assert 'density' not in told and json.loads((tmp_path/by/'model.json').read_text())['mask'] is None
    assert not frozen['alpha'] & frozen['alpha*'] and frozen['random'] not in (frozen['alpha'], frozen['alpha*'])
    r = opentrans('transfer', '--dense', *few, '--freeze', 0, '--json')
    assert r.returncode == 0 and 'frozen' not in json.loads(r.stdout)
    assert 'Give a mask file, or --dense' in fails('transfer', *few)
    assert 'leave out' in fails('transfer', mask, '--dense', *few)

def test_alpha_is_read_before_the_mask_is_adopted(mask, tmp_path):
    """Supplement 6.3: from weights without the mask by default, and from those under it if asked; the mask holds
    afterwards in both."""
    from opentrans.clip import ClipBackbone
    from opentrans.core import LayerSelection
    from opentrans.files import load_tensors
    from opentrans.heavy_tail import analyze
    from opentrans.pruning import SparseMask
    found,m = {},SparseMask.load(mask)
    for of in ('dense', 'masked'):
        few = ('--iterations', 1, '--warmup', 0, '--batch-size', 1, '--limit', 1)
        r = opentrans('transfer', mask, *few, '--alpha-of', of, '--out', tmp_path/of)
        assert r.returncode == 0, r.stderr
        clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
        if of == 'masked': m.apply(clip).remove()
        found[of] = LayerSelection.from_json(tmp_path/of/'selection.json')
        assert found[of].freeze == analyze(clip).select(freeze=.5).freeze
        weights = load_tensors(tmp_path/of/'model.safetensors')[0]
        assert all((weights[f'backbone.visual.{n}'][~m[n]] == 0).all() for n in m.names)
    assert {*found['dense'].freeze} != {*found['masked'].freeze}, 'nothing tells the two apart here'
    assert 'dense' in fails('transfer', mask, '--alpha-of', 'sparse')

def test_settings_of_a_transfer_are_the_same_run_again(mask, tree, tmp_path, small_looks):
    "The settings that a run keeps, read as a file of settings, are that run."
    common = ('transfer', mask, '--root', tree, '--limit', 1)
    few = ('--iterations', 10, '--batch-size', 1, '--crop', 32)
    first = opentrans(*common, '--data', 'coco_panoptic', '--recipe', 'released', *few, '--out', tmp_path/'a')
    assert first.returncode == 0, first.stderr
    again = opentrans(*common, '--config', tmp_path/'a'/'settings.json', '--out', tmp_path/'b')
    assert again.returncode == 0, again.stderr
    for part in ('warmup', 'finetune'):
        one,two = ((tmp_path/run/part/'history.csv').read_text() for run in 'ab')
        assert one == two

@pytest.mark.parametrize('command', ['finetune', 'transfer'])
def test_a_dry_run_says_what_a_run_needs(command, mask, tmp_path):
    "Memory, an iteration, an epoch and the whole, for as many processes as are meant; nothing is written."
    args = ('finetune',) if command == 'finetune' else ('transfer', mask)
    r = opentrans(*args, '--out', tmp_path/'o', '--iterations', 100, '--dry-run', '--processes', 4, '--batch-size',
                  8, '--accumulate', 2, '--json')
    assert r.returncode == 0, r.stderr
    told = json.loads(r.stdout)
    assert (told['part'] == 1 and told['processes'] == 4 and told['fits'] and told['iterations'] == 100
            and 0 < told['memory'] < told['room'])
    assert told['hours'] == pytest.approx(told['seconds']*100/3600) and not list(tmp_path.glob('o/*'))
    r = opentrans(*args, '--out', tmp_path/'o', '--dry-run')
    assert r.returncode == 0 and 'an epoch' in r.stdout and 'GB' in r.stdout, r.stderr
    assert 'parameters' in r.stdout and 'multiply-accumulates' in r.stdout
    assert told['params'] > 1e6 and told['active_macs'] <= told['macs'] and (command == 'transfer') == (
        told['active_params'] < told['params'])

def test_a_mask_over_the_mask_of_a_model(streets, mask, tmp_path, small_looks):
    "What is counted is what both masks leave, whichever is given last."
    common = ('--data', 'folder', '--root', streets, '--classes', NAMES, '--ignore', 11)
    short = ('--iterations', 1, '--batch-size', 2, '--crop', 48, '--workers', 0, '--eval-limit', 0)
    r = opentrans('finetune', *common, *short, '--mask', mask, '--out', tmp_path/'run')
    assert r.returncode == 0, r.stderr
    looser = tmp_path/'looser.safetensors'
    assert opentrans('prune', '--method', 'magnitude', '--density', .7, '--out', looser).returncode == 0
    def counted(*args):
        r = opentrans('evaluate', '--model', tmp_path/'run', *common, '--limit', 1, '--json', *args)
        assert r.returncode == 0, r.stderr
        found = json.loads(r.stdout)
        return [found[name] for name in ('density', 'active_params', 'active_macs')]
    assert counted('--mask', looser) == counted() == counted('--mask', mask)

def test_what_is_left_out_is_left_out_in_the_next_command(streets, tmp_path, small_looks):
    "The command that `finetune` shows runs; commands without --corrupt do not advise it."
    import shlex, shutil
    folder = tmp_path/'own, größer'
    shutil.copytree(streets, folder)
    shutil.copy(folder/'labels'/'s0.png', folder/'labels'/'more.png')
    common = ('--root', folder, '--classes', NAMES, '--ignore', 11)
    for command in (('data', 'check', 'folder'), ('cka', '--data', 'folder')):
        message = fails(*command, *common)
        assert "no image for 'more.png'" in message and 'Mend this.' in message and 'corrupt' not in message
    assert '--corrupt skip' in fails('evaluate', '--data', 'folder', *common)
    with pytest.warns(UserWarning, match='left out'):
        r = opentrans('finetune', '--data', 'folder', *common, '--corrupt', 'skip', '--iterations', 1,
                      '--batch-size', 2, '--crop', 48, '--workers', 0, '--eval-limit', 0, '--out', tmp_path/'run')
    assert r.returncode == 0, r.stderr
    shown = next(line for line in r.stdout.splitlines() if line.startswith('next: '))
    with pytest.warns(UserWarning, match='left out'):
        r = opentrans(*shlex.split(shown)[2:], '--limit', 1)
    assert r.returncode == 0, r.stderr

def test_files_that_would_not_be_written(streets, tmp_path):
    "A flag that names a file which a command has no use for is told, and a place is looked at before the work."
    out = tmp_path/'m.safetensors'
    for method in ('magnitude', 'random', 'snip'):
        assert '--weights' in fails('prune', '--method', method, '--weights', tmp_path/'w.safetensors', '--out', out)
    assert '--try' in fails('models', '--out', tmp_path/'models.csv')
    taken = tmp_path/'taken'
    taken.write_text('mine')
    assert 'Not a directory' in fails('segment', streets/'images'/'s0.png', 'sky', '--out', taken/'s.png')
    assert [*tmp_path.iterdir()] == [taken]

def test_cka_is_over_all_images(mask):
    "Also over the few that would be no batch of their own."
    said = '--images 2: CKA compares 4 images or more.'
    assert said in fails('cka', '--mask', mask, '--images', 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = opentrans('cka', '--mask', mask, '--images', 18)
    assert found.returncode == 0 and 'CKA over 18 images' in found.stdout

def test_a_mask_where_weights_are_due(mask):
    assert '--mask' in fails('alpha', mask)

def test_no_layer_rests_where_random_weights_are_timed():
    "A new ResNet's blocks end with norms of 0, and the engine skips zeros: its clock would be too fast."
    found = json.loads(opentrans('speed', '--layers', '--densities', 1, '--size', '64x64', '--seconds', .02,
                                 '--json').stdout)
    assert len(found) > 15 and all(row['kept'] == row['weights'] for row in found.values())
    from opentrans.cli.options import clip_to_time
    trained = clip_to_time('shapes-rn', 'shapes-rn')
    from opentrans.clip import ClipBackbone
    assert torch.equal(trained.visual.layer1[0].bn3.weight,
                       ClipBackbone.create('shapes-rn', pretrained='shapes-rn').visual.layer1[0].bn3.weight)

def test_what_a_table_is_for_is_in_a_narrow_terminal(mask, tmp_path, monkeypatch):
    "Columns that find no room are the last ones; those that a command is called for stand first."
    from opentrans.cli import terminal
    settings = dict(framework='deeplabv3', data='folder of a long name', images=9, over='truth', kind='semantic')
    costs = dict(params=10**6, active_params=10**5, macs=10**8, active_macs=10**7)
    for name in ('one', 'two'):
        (tmp_path/name).mkdir()
        result = dict(miou=.5, n_images=9, settings=settings, density=.1, head='trained', **costs)
        (tmp_path/name/'result.json').write_text(json.dumps(result))
    shown = []
    def narrow(frame, title):
        columns = terminal._cells(frame)
        many = len(columns)
        while terminal._least_width(frame, columns[:many]) > 80: many -= 1
        shown.append(list(frame.columns[:many]))
    monkeypatch.setattr(terminal, '_show_table', narrow)
    for args in (('compare', tmp_path/'one', tmp_path/'two'), ('cost', '--layers', '--mask', mask),
                 ('speed', '--layers', '--mask', mask, '--size', '64x64', '--seconds', .02)):
        r = opentrans(*args)
        assert r.returncode == 0, r.stderr
    runs,layers,times = shown
    assert {'miou', 'density', 'active_macs_M'} <= {*runs} and {'macs', 'active_macs'} <= {*layers}
    assert {'layer', 'ms', 'dense_ms', 'times'} <= {*times}

def test_no_file_is_written_over_one_that_is_read(streets, mask, tmp_path):
    "A photograph, a mask and a checkpoint stay, by whatever path the flag of the result names them."
    import shutil
    photo = shutil.copy(streets/'images'/'s0.png', tmp_path/'my photo.png')
    own = shutil.copy(mask, tmp_path/'own.safetensors')
    model = tmp_path/'model.pth'
    torch.save({'visual.conv1.weight': torch.zeros(1)}, model)
    (tmp_path/'link').symlink_to(tmp_path)
    before = {path: path.read_bytes() for path in (photo, own, model)}
    for args in (('segment', photo, 'sky', '--out', tmp_path/'link'/'my photo.png'),
                 ('transfer', own, model, '--out', own), ('transfer', own, model, '--out', model),
                 ('prune', '--method', 'wanda', '--pretrained', own, '--out', own),
                 ('prune', '--method', 'wanda', '--out', tmp_path/'new.safetensors', '--weights',
                  tmp_path/'new.safetensors')):
        assert 'would be written over' in fails(*args)
    assert {path: path.read_bytes() for path in before} == before and not (tmp_path/'new.safetensors').exists()
