"""What the paper's run takes: CPU seconds and memory an image of each step, and multiply-accumulates.

    python tests/fake_datasets.py ROOT --train 16 --val 2
    OMP_NUM_THREADS=1 python benchmarks/bench_paper_run.py ROOT [--steps prune,train-fpn,...] [--out result.json]

The results are shown on the page "The paper's run". CLIP's RN50 has random weights: they change nothing of time and
memory. Images have the sizes that the paper's recipes and evaluation give them. Each step is taken with two numbers
of images, and its seconds and bytes are a line through the two: what it needs whatever the batch, and for each
image. Seconds are CPU seconds of one thread, so that other work on the machine counts little.

A file of results is added to, step by step: what a step had before is replaced. Embeddings of names are random but
in the step `text`, which measures what one prompt takes. A step of training needs up to 5 GB; that of FC-CLIP, whose
images are four times as large, is taken with one image alone, and needs 12.
"""
import argparse, functools, platform, time
from pathlib import Path
from statistics import median
import torch
from opentrans.clip import ClipBackbone
from opentrans.cost import cost, peak_memory, training_memory
from opentrans.data import VOCABULARIES, Vocabulary, View, open_dataset
from opentrans.distill import DistillTrainer
from opentrans.errors import OpenTransError
from opentrans.files import load_json, save_json
from opentrans.training import evaluate, finetune, Recipe, released_size
from opentrans.frameworks import build, get_framework

FRAMEWORKS = ('deeplabv3', 'mask2former', 'fcclip', 'faseg', 'fpn')
SETS = ('coco_panoptic', 'cityscapes_19', 'ade20k_150', 'ade20k_847', 'voc_20', 'context_59', 'context_459')

class AnyWord(dict):
    "A memory of prompts that knows each of them, by a random embedding."
    def __init__(self, size):
        super().__init__()
        self.size = size
    def __contains__(self, prompt): return True
    def __getitem__(self, prompt): return torch.nn.functional.normalize(torch.randn(self.size), dim=0)
    def update(self, *found): pass

@functools.lru_cache
def first_clip(stride):
    "RN50 with random weights; nothing is spent on names."
    clip = ClipBackbone.create('RN50', output_stride=stride)
    clip.text.cache = AnyWord(clip.embed_dim)
    return clip

def open_clip(stride=32): return first_clip(stride).fresh_copy()

def stride_of(name): return 16 if name == 'deeplabv3' else 32

def prompted(data, name):
    "A data set whose names stand in the prompts of a framework."
    data.vocabulary = Vocabulary(data.vocabulary.entries, get_framework(name).prompts)
    return data

def open_framework(name, root):
    "A framework of the paper's size, and COCO to train it on."
    data = prompted(open_dataset('coco_panoptic', root, 'train'), name)
    return build(name, open_clip(stride_of(name)), vocabulary=data.vocabulary, preset='paper', seed=0), data

def line(few, many):
    "From (images, seconds, bytes) twice: seconds and bytes for each image, and whatever the batch."
    (n, short, small), (m, long, large) = few, many
    seconds, size = (long-short)/(m-n), (large-small)/(m-n)
    return dict(seconds=seconds, seconds_fixed=max(short-seconds*n, 0.), bytes=size,
                bytes_fixed=max(small-size*n, 0.))

def both(take):
    "A line through one image and two, or through two and three where a batch norm of one image has a single value."
    for sizes in ((1, 2), (2, 3)):
        try: return line(*[(n, *take(n)) for n in sizes])
        except OpenTransError as error:
            if 'norm' not in str(error) or sizes != (1, 2): raise

def one_alone(take):
    "One image, where two do not fit: what it needs whatever the batch is within."
    seconds, size = take(1)
    return dict(seconds=seconds, seconds_fixed=0., bytes=size, bytes_fixed=0.)

def fullest(data, images):
    "So many times the image with the most regions, which needs the most."
    counts = [len(data[i]['region_classes']) for i in range(min(8, len(data)))]
    return View(data, [counts.index(max(counts))]*images)

def step_prune(root):
    "An iteration of Algorithm 1's training, with reading."
    clip = open_clip()
    data = open_dataset('coco_panoptic', root, 'train')
    def take(n):
        train = DistillTrainer(clip, fullest(data, n), crop=512, iterations=2, batch_size=n)
        began = time.process_time()
        peak = peak_memory(lambda: train(clip, 0))
        return (time.process_time()-began)/2, peak
    return both(take)

def step_tower(root):
    "Multiply-accumulates of the tower for a student's window, and for a crop that the teacher sees."
    clip = open_clip()
    window, crop = (cost(clip, (3, side, side)).macs for side in (512, 224))
    return dict(macs_512=window, macs_224=crop, params=sum(p.numel() for p in clip.parameters()))

def step_train(name, root):
    "An iteration of fine-tuning by the paper's recipe, with reading: the second of two."
    seg, data = open_framework(name, root)
    def take(n):
        recipe = Recipe.paper(name).replace(iterations=2, batch_size=n, workers=0, schedule='constant',
                                            milestones=())
        ends = []
        def note(*_): ends.append(time.process_time())
        peak = peak_memory(lambda: finetune(seg, fullest(data, n), recipe, callback=note))
        return ends[1]-ends[0], peak
    return one_alone(take) if Recipe.paper(name).crop > 512 else both(take)

def step_count(name, root):
    "Multiply-accumulates, parameters, and memory counted without computing: a pass to class scores, and back."
    seg, _ = open_framework(name, root)
    recipe = Recipe.paper(name)
    looks, side = released_size(name, 'coco_panoptic'), recipe.crop
    seen = (looks['size'], round(looks['size']*4/3))
    kind = 'momentum' if recipe.optimizer == 'sgd' else recipe.optimizer
    few, many = (training_memory(seg, (n, 3, side, side), optimizer=kind)['peak'] for n in (2, 3))
    memory = line((2, 0., int(few)), (3, 0., int(many)))
    params = sum(p.numel() for p in seg.parameters())
    return dict(side=side, batch=recipe.batch_size, iterations=recipe.iterations, params=params, seen=list(seen),
                macs=cost(seg.eval(), (3, side, side)).macs, macs_evaluate=cost(seg.eval(), (3, *seen)).macs,
                counted=memory['bytes'], counted_fixed=memory['bytes_fixed'])

def step_evaluate(name, test, root):
    "An image of an evaluation at the released size, with reading."
    seg, _ = open_framework(name, root)
    data = prompted(open_dataset(test, root, 'val'), name)
    looks = released_size(name, test)
    height, width = data[0]['image'].shape[-2:]
    scale = min(looks['size']/min(height, width), looks['longest']/max(height, width))
    began = time.process_time()
    peak = peak_memory(lambda: evaluate(seg, data, limit=1, batch_size=1, over='truth', **looks))
    seconds = time.process_time()-began
    seen = [round(side*scale) for side in (height, width)]
    return dict(seconds=seconds, bytes=peak, seen=seen)

def seconds_of(act):
    "CPU seconds that something takes."
    began = time.process_time()
    act()
    return time.process_time()-began

def step_text(root):
    "A prompt of the text side, cut behind its end and whole, in turns; and how many prompts the names of all sets are."
    clip, words = ClipBackbone.create('RN50'), [f'a photo of number {i}.' for i in range(16)]
    encoder, tokens = clip.text, clip.text.tokenizer(words)
    def cut():
        encoder.cache.clear()
        encoder.prompts(words)
    @torch.no_grad()
    def whole(): encoder.model.encode_text(tokens)
    pairs = [(seconds_of(cut), seconds_of(whole)) for _ in range(5)]
    short, long = (median(each)/len(words) for each in zip(*pairs))
    def count(framework):
        asked = [Vocabulary(VOCABULARIES[name].entries, get_framework(framework).prompts).prompts()
                 for name in SETS]
        return sum(len(texts) for classes in asked for texts in classes)
    return dict(seconds=short, seconds_whole=long, prompts=count('mask2former'), prompts_fcclip=count('fcclip'))

def steps():
    "Each step by its name."
    found = dict(tower=step_tower, text=step_text, prune=step_prune)
    found.update({f'count-{name}': functools.partial(step_count, name) for name in FRAMEWORKS})
    found.update({f'train-{name}': functools.partial(step_train, name) for name in FRAMEWORKS})
    for name in FRAMEWORKS:
        for test in SETS: found[f'evaluate-{name}-{test}'] = functools.partial(step_evaluate, name, test)
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', help='folder with the seven data sets')
    parser.add_argument('--steps', help='names with commas; default: all')
    parser.add_argument('--out', default=Path(__file__).with_suffix('.json'), type=Path)
    told, known = parser.parse_args(), steps()
    torch.set_num_threads(1)
    for name in told.steps.split(',') if told.steps else known:
        if name not in known: parser.error(f"unknown step {name}: one of {', '.join(known)}")
        made = {k: round(v, 4) if isinstance(v, float) else v for k, v in known[name](told.root).items()}
        kept = load_json(told.out) if told.out.exists() else dict(steps={})
        kept.update(machine=platform.machine(), torch=torch.__version__, threads=1,
                    steps={**kept['steps'], name: made})
        save_json(kept, told.out)
        print(name, made, flush=True)

if __name__ == '__main__': main()
