"Studies on data of real formats, and what becomes of one that is interrupted."
import dataclasses, functools, json, math
from pathlib import Path
import pytest
from opentrans import experiments as ex
from opentrans.core import OpenTransError, load_json
from opentrans.data import ShapesWorld, write_coco_panoptic

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
    assert load_json(tmp_path/'out'/'similarity-1seeds.json')['scale']['pretrained'] == ''

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

def test_a_folder_of_older_settings_is_known(tmp_path):
    "A size that was added later has its default in a folder that does not name it; another value is refused."
    ex._claim(tmp_path, DISK, 3)
    kept = load_json(tmp_path/'study.json')
    old = {k: v for k,v in kept.items() if k not in ('domain', 'zero_shot')}
    (tmp_path/'study.json').write_text(json.dumps(old))
    with pytest.raises(OpenTransError, match='other sizes'): ex._claim(tmp_path, DISK, 3) # these are not the defaults
    (tmp_path/'study.json').write_text(json.dumps({k: v for k,v in kept.items() if k != 'width'}))
    ex._claim(tmp_path, DISK, 3)
    assert load_json(tmp_path/'study.json') == kept
