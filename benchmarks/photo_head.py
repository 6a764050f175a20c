"""Does the tower matter on photographs, and what does the geometric ensemble with the untouched tower give?

python benchmarks/photo_head.py ROOT                 DeepLabV3 of the scale `photo`, all layers against a frozen
tower, one seed (20 minutes of a core)
                                --seeds 5 --iterations 500 --modes 'all layers'

ROOT holds msrc, camvid and tiny_imagenet. Training sees the 15 base names of MSRC; all 21 names are judged on
its 119 validation photographs.
The ensemble is FC-CLIP's: log p = (1-a) log p_head + a log p_zero-shot, with one a for base names and another
for novel ones. Writes photo_head.json.
"""
import argparse, dataclasses, os, time, warnings
from pathlib import Path
import torch
from opentrans.core import LayerSelection, layers
from opentrans.data import SemanticIoU
from opentrans.errors import OpenTransError
from opentrans.experiments.arms import build_framework
from opentrans.experiments.scale import get_scale, hardware, open_clip_of, world_of
from opentrans.files import save_json
from opentrans.frameworks.contract import resize
from opentrans.training import finetune

HERE = Path(__file__).resolve().parent
ENSEMBLES = ((0., 0.), (.3, .8), (.4, .8)) # a of base names, of novel ones; the first is the head alone
MODES = ('all layers', 'frozen')
SCALE = 20. # of the cosine similarities of the untouched tower

def train(mode, scale, seed):
    "A framework after its fine-tuning, and the seconds of processor time that it took."
    world = world_of(scale, seed)
    seg = build_framework('', open_clip_of(scale), world['train'].vocabulary, scale, seed)
    recipe,selection = scale.recipe(sum(scale.steps()), 'poly', seed, after=0),None
    if mode == 'frozen':
        selection = LayerSelection([], [layer.name for layer in layers(seg.backbone)], 'all frozen')
        recipe = recipe.replace(backbone_lr=0.)
    began = time.process_time()
    finetune(seg, world['train'], recipe, selection=selection)
    return seg.eval(),time.process_time()-began

def log_probabilities(seg, untouched, image, text):
    "Of the head, and of the untouched tower without any head: (1,K,H,W) each, at an eighth of the size."
    size = [n//8 for n in image.shape[-2:]]
    head = resize(seg.forward(image, text), size).log_softmax(1)
    near = torch.einsum('bdhw,kd->bkhw', untouched.dense_embeddings(image), text)
    return head,resize(SCALE*near, size).log_softmax(1)

@torch.no_grad()
def judge(seg, untouched, data, ensembles):
    "mIoU in percent over base and over novel names, for each ensemble."
    text = untouched.encode_text(data.vocabulary)
    groups = data.groups or dict(base=list(range(len(text))))
    novel = torch.zeros(len(text), dtype=torch.bool)
    novel[groups.get('novel', [])] = True
    scores = [SemanticIoU(len(text), data.ignore) for _ in ensembles]
    for i in range(len(data)):
        sample = data[i]
        head,zero = log_probabilities(seg, untouched, sample['image'][None], text)
        for score,(base_share,novel_share) in zip(scores, ensembles):
            share = torch.where(novel, novel_share, base_share)[None, :, None, None]
            joined = resize((1-share)*head + share*zero, sample['labels'].shape)
            score.update(joined.argmax(1)[0], sample['labels'])
    found = [score.compute(groups=groups)['groups'] for score in scores]
    return [dict(a=list(pair), **{name: 100*value for name,value in of_pair.items()})
            for pair,of_pair in zip(ensembles, found)]

def main(seeds, iterations, modes):
    scale = get_scale('photo')
    if iterations: scale = scale.shorten(iterations)
    rows = []
    for seed in range(seeds):
        for mode in modes:
            seg,seconds = train(mode, scale, seed)
            world,untouched = world_of(scale, seed),open_clip_of(scale)
            row = dict(mode=mode, seed=seed, iterations=sum(scale.steps()), seconds=round(seconds, 1),
                       msrc=judge(seg, untouched, world['val'], ENSEMBLES))
            row.update({name: judge(seg, untouched, world[name], ENSEMBLES[:1])[0]['base']
                        for name in ('camvid', 'mosaic')})
            rows.append(row)
            print(row, flush=True)
            save_json(dict(what='all layers against a frozen tower on photographs, mIoU in percent',
                           scale=dataclasses.asdict(scale), rows=rows, run=hardware()), HERE/'photo_head.json')

if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('root')
    ask.add_argument('--seeds', type=int, default=1)
    ask.add_argument('--iterations', type=int)
    ask.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    told = ask.parse_args()
    os.environ['DETECTRON2_DATASETS'] = told.root
    warnings.filterwarnings('ignore', '.*was shown')
    try: main(told.seeds, told.iterations, told.modes)
    except OpenTransError as error: raise SystemExit(str(error)) from None
