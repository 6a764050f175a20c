"""Labels of pixels from the logits of many classes: all interpolated to the size of the image, or those that can win.

    OMP_NUM_THREADS=1 python benchmarks/bench_best_class.py [--images 12] [--iterations 300] [--root DATA]
    [--out bench_best_class.json]

A DeepLabV3 and a Mask2Former learn the generated world (`ShapesWorld`) for some iterations on the ResNet that ships
with the package, and label pictures of 640x480 pixels with 133 and 847 names: those of the world, and others made of
words that their CLIP knows. With the folder of the MSRC photographs, cells of the photographs' CLIP are labelled with
the names of COCO and of ADE20K, too, without any training.
For each picture the two ways take turns; a ratio is the median of the ratios of each picture. Times are those of the
processor, without the waiting. `model` is the time until there are scores.
"""
import argparse
import numpy as np
import torch
from bench_rejection import names_of, seconds
from opentrans.clip import ClipBackbone
from opentrans.data import open_dataset, ShapesWorld, Vocabulary
from opentrans.data.vocabulary import VOCABULARIES
from opentrans.experiments import hardware
from opentrans.files import save_json
from opentrans.frameworks import build
from opentrans.frameworks.contract import best_class, resize, Scores, scores_of, text_logits
from opentrans.runtime import seed_everything
from opentrans.training import finetune, Recipe

WIDE,HIGH = 640,480

def in_turns(scores_of_picture, pictures):
    "Seconds of the model, of all classes and of those that can win, and whether labels are the same."
    rows = []
    for picture in pictures:
        model,scores = seconds(lambda: scores_of_picture(picture))
        whole,labels = seconds(lambda: scores.ready().part(0, scores.classes).argmax(1))
        ours,found = seconds(lambda: best_class(scores))
        rows.append((model, whole, ours, (found == labels).double().mean().item()))
    return np.array(rows[1:]).T # the first warms up

def row_of(model, whole, ours, same, **about):
    "One row of the result."
    row = dict(about, pictures=len(model), model_ms=float(1000*np.median(model)),
               all_classes_ms=float(1000*np.median(whole)), that_can_win_ms=float(1000*np.median(ours)),
               times_faster=float(np.median(whole/ours)),
               times_faster_with_model=float(np.median((model+whole)/(model+ours))), same_label=float(same.mean()))
    print(row, flush=True)
    return row

def generated(args):
    "Rows of two frameworks that have learned the generated world."
    learned = ShapesWorld('train', n=512, size=64)
    world = ShapesWorld('val', n=args.images+1, size=HIGH)
    pictures = [resize(world[i]['image'][None], (HIGH, WIDE)) for i in range(len(world))]
    for name in ('deeplabv3', 'mask2former'):
        seg = build(name, ClipBackbone.create('shapes-rn', pretrained='shapes-rn'), vocabulary=learned.vocabulary,
                    preset='small', seed=0)
        finetune(seg, learned, Recipe.tiny().replace(iterations=args.iterations))
        seg.eval()
        for count in (133, 847):
            text = seg.text(Vocabulary(names_of(world, count)))
            yield row_of(*in_turns(lambda x: scores_of(seg, x, text), pictures), pictures_of='generated shapes',
                         framework=name, names=count)

def photographs(args):
    "Rows of the photographs' CLIP, asked for the names of COCO and ADE20K."
    data = open_dataset('msrc', args.root, 'val')
    pictures = [resize(data[i]['image'][None], (HIGH, WIDE)) for i in range(args.images+1)]
    seg = build('training_free', ClipBackbone.create('photo-lite0', pretrained='photo-lite0'),
                vocabulary=data.vocabulary).eval()
    for name in ('coco_panoptic', 'ade20k_847'):
        words = seg.backbone.encode_text(VOCABULARIES[name])
        def scores(x): return Scores(text_logits(seg.cells(x)[0][0], words, 100.), (HIGH, WIDE))
        yield row_of(*in_turns(scores, pictures), pictures_of='photographs', framework='cells of photo-lite0',
                     names=len(words))

@torch.no_grad()
def measured(rows): return list(rows)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--images', type=int, default=12)
    p.add_argument('--iterations', type=int, default=300)
    p.add_argument('--root')
    p.add_argument('--out')
    args = p.parse_args()
    seed_everything(0)
    rows = measured(photographs(args)) if args.root else []
    rows += list(generated(args))
    run = dict(hardware(), threads=torch.get_num_threads(),
               command=f"python benchmarks/bench_best_class.py --images {args.images} --iterations {args.iterations}"
                       f"{' --root DATA' if args.root else ''}")
    if args.out: save_json(dict(what='Labels from the logits of many classes', run=run, rows=rows), args.out)

if __name__ == '__main__': main()
