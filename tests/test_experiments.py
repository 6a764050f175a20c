"Studies on data of real formats, and what becomes of one that is interrupted."
import dataclasses, functools, json, math, os, signal, subprocess, sys
from pathlib import Path
import pytest
from opentrans import experiments as ex
from opentrans.core import OpenTransError, load_json
from opentrans.data import ShapesWorld, write_coco_panoptic
from conftest import PATIENCE, until

SAMPLES = Path(__file__).resolve().parents[1]/'../shared/data/samples'
DISK = dataclasses.replace(ex.SCALES['smoke'], data='coco_panoptic', paper=True, batch_size=2, imp_crop=64, checkpoint=1)

@pytest.mark.filterwarnings('ignore:.*has never seen')
@pytest.mark.skipif(not SAMPLES.is_dir(), reason='the sample images are not at ../shared/data/samples')
def test_a_study_on_real_images(tmp_path, monkeypatch):
    "COCO's own files to train on, ADE20K's to evaluate on, with their 133 and 150 names."
    root = tmp_path/'datasets'; root.mkdir()
    for p in [*(SAMPLES/'coco_panoptic').iterdir(), *(SAMPLES/'ade20k').iterdir()]: (root/p.name).symlink_to(p.resolve())
    monkeypatch.setenv('DETECTRON2_DATASETS', str(root))
    data = ex.run_study('similarity', tmp_path/'out', seeds=1, scale=dataclasses.replace(DISK, sets=('ade20k_150',)), workers=1)
    assert [r['arm'] for r in data['results']] == ['dense', 'distilled mask', 'random']
    for r in data['results']: assert set(r['miou']) == {'base', 'ade20k_150'} and all(0 <= v <= 1 for v in r['miou'].values()) and math.isnan(r['cka'])   # two images are too few for CKA
    assert 'Real data' in data['what'] and 'mIoU ade20k_150' in data['summary']['random']
    assert load_json(tmp_path/'out'/'similarity-own-1seeds.json')['scale']['pretrained'] == ''

def test_a_long_arm_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    "Interrupted within a fine-tuning, the study does the rest of it; the result is that of an unbroken run."
    for split,n in (('train', 6), ('val', 4)): write_coco_panoptic(ShapesWorld(split, n=n, size=64), tmp_path/'datasets', split)
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'datasets'))
    few,scale = [ex.Arm('dense', table='study'), ex.Arm('half', select='alpha', table='study')],dataclasses.replace(DISK, iterations=3)
    steps,real = [],ex.finetune
    def counted(*args, callback=None, stop=None, **kw):
        def look(seg, row):
            steps.append(int(row['iteration']))
            if stop is not None and len(steps) == stop: raise KeyboardInterrupt
        return real(*args, callback=look, **kw)
    monkeypatch.setattr(ex, 'finetune', counted)
    whole = ex.study(scale, 0, tmp_path/'whole', arms=few)
    assert steps == [0, 0, 1, 2, 0, 1, 2] # a warm-up, and two arms
    steps.clear(); monkeypatch.setattr(ex, 'finetune', functools.partial(counted, stop=3))
    with pytest.raises(KeyboardInterrupt): ex.study(scale, 0, tmp_path/'broken', arms=few)
    assert steps == [0, 0, 1] and len(list((tmp_path/'broken').glob('*.run'))) == 1
    steps.clear(); monkeypatch.setattr(ex, 'finetune', counted)
    again = ex.study(scale, 0, tmp_path/'broken', arms=few)
    assert steps == [2, 0, 1, 2] and not list((tmp_path/'broken').glob('*.run'))
    for a,b in zip(whole, again): assert json.dumps({**a, 'seconds': 0}) == json.dumps({**b, 'seconds': 0})

def test_nothing_is_trained_again_if_measuring_breaks(tmp_path, monkeypatch):
    "An error in the evaluation leaves the finished checkpoint, and the next call only measures."
    for split,n in (('train', 6), ('val', 4)): write_coco_panoptic(ShapesWorld(split, n=n, size=64), tmp_path/'datasets', split)
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'datasets'))
    steps,real,measure = [],ex.finetune,ex.evaluate
    monkeypatch.setattr(ex, 'finetune', lambda *a, **kw: real(*a, callback=lambda seg, row: steps.append(int(row['iteration'])), **kw))
    def no_memory(*a, **kw): raise MemoryError
    monkeypatch.setattr(ex, 'evaluate', no_memory)
    arms = [ex.Arm('dense', table='study')]
    with pytest.raises(MemoryError): ex.study(DISK, 0, tmp_path/'runs', arms=arms)
    assert steps == [0, 0, 1]
    monkeypatch.setattr(ex, 'evaluate', measure)
    assert ex.study(DISK, 0, tmp_path/'runs', arms=arms)[0]['miou'] and steps == [0, 0, 1] and not list((tmp_path/'runs').glob('*.run'))

def test_seeds_share_the_processes(tmp_path, one_thread):
    "Two seeds in two processes give what each gives alone."
    arms,scale = [ex.Arm('dense', table='study')],ex.SCALES['smoke']
    both = ex.study(scale, (0, 1), tmp_path/'both', 2, arms)
    alone = [ex.study(scale, n, tmp_path/f'alone{n}', 1, arms)[0] for n in (0, 1)]
    assert [r['miou'] for r in both] == [r['miou'] for r in alone] and both[0]['miou'] != both[1]['miou']

def test_images_of_several_sizes(tmp_path):
    "Similarity is measured on them, and pictures are of the images that they stand beside."
    clip = ex.open_clip_of(DISK)
    class Sizes(list):
        vocabulary,ignore,name = ShapesWorld(n=1).vocabulary,65535,'sizes'
    data = Sizes(ShapesWorld('val', n=1, size=s, seed=i)[0] for i,s in enumerate((64, 80, 64, 96)))
    seg = ex.build('deeplabv3', clip, vocabulary=data.vocabulary, preset='small', width=8)
    s = ex.clip_similarity(seg, data, ex.open_clip_of(DISK))
    assert all(.9 < v <= 1+1e-6 for v in s.values()) # nothing was trained
    assert ex._predictions(seg, data, 4).shape == (1, 64, 64) and ex._predictions(seg, Sizes([data[0], data[2]]), 4).shape == (2, 64, 64)

def test_a_folder_is_of_its_data_and_weights(tmp_path, monkeypatch):
    "Other images, other weights and what cannot be opened do not take over a folder's runs."
    for name,n in (('a', 4), ('b', 5)):
        for split in ('train', 'val'): write_coco_panoptic(ShapesWorld(split, n=n, size=64), tmp_path/name, split)
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'a')); ex._claim(tmp_path/'runs', DISK, 0)
    assert len(ex.open_world(DISK, 0)['val']) == 4
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'b'))
    assert len(ex.open_world(DISK, 0)['val']) == 5
    with pytest.raises(OpenTransError, match='other sizes, data or weights'): ex._claim(tmp_path/'runs', DISK, 0)
    with pytest.raises(OpenTransError): ex.run_study('ratio', tmp_path/'out', seeds=1, scale='smoke', workers=1, pretrained=str(tmp_path/'typo.safetensors'))
    assert not (tmp_path/'out').exists()
    for name in ('one', 'two'): (tmp_path/name).write_bytes(name.encode())
    a,b = (dataclasses.replace(DISK, pretrained=str(tmp_path/n)) for n in ('one', 'two'))
    assert ex._weights_of(a) != ex._weights_of(b) and str(tmp_path) not in ex._weights_of(a)

def test_a_folder_of_older_settings_is_known(tmp_path):
    "A size that was added later has its default in a folder that does not name it; another value is refused."
    scale = ex.SCALES['smoke']; ex._claim(tmp_path, scale, 3)
    kept = load_json(tmp_path/'study.json')
    (tmp_path/'study.json').write_text(json.dumps({k: v for k,v in kept.items() if k not in ('sha256', 'domain', 'zero_shot')}))
    with pytest.raises(OpenTransError, match='other sizes'): ex._claim(tmp_path, scale, 3) # these are not the defaults
    (tmp_path/'study.json').write_text(json.dumps({k: v for k,v in kept.items() if k not in ('sha256', 'width', 'queries', 'sets', 'data', 'pretrained', 'device', 'paper', 'checkpoint')}))
    ex._claim(tmp_path, scale, 3)
    assert load_json(tmp_path/'study.json') == kept

@pytest.mark.parametrize('sent', (signal.SIGINT, signal.SIGTERM))
def test_workers_end_with_their_parent(tmp_path, sent):
    "One at work and one that waits for work; none is left behind, and nothing hangs: by Ctrl-C, which all of them hear, and by SIGTERM to the parent alone."
    script = tmp_path/'jobs.py'
    script.write_text("import time\nfrom opentrans.experiments import run_jobs\nif __name__ == '__main__': run_jobs({'short': ((), time.sleep, (0,)), 'long': ((), time.sleep, (10**6,))}, 2, 'jobs')\n")
    env = {k: v for k,v in os.environ.items() if k not in ('OPENTRANS_PROGRESS', 'IN_TEST')}
    p = subprocess.Popen([sys.executable, script], env=dict(env, PYTHONPATH=str(Path(__file__).resolve().parents[1])), stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert p.stderr.readline() == 'jobs: 1 of 2 done, short\n'
    os.killpg(p.pid, sent) if sent == signal.SIGINT else p.terminate()
    said = p.communicate(timeout=PATIENCE)[1]
    assert p.returncode and said.count('KeyboardInterrupt') == (sent == signal.SIGINT), (p.returncode, said)
    def left():
        try: os.killpg(p.pid, 0); return True
        except ProcessLookupError: return False
    until(lambda: not left(), 'a process was left behind')                         # multiprocessing's own tracker ends a moment after its parent
