"""Images a second of opentrans' loader beside detectron2's, on a tree in the layout of COCO-panoptic.

    OMP_NUM_THREADS=1 python benchmarks/bench_loader.py ROOT [--images 60] [--rounds 5] [--out result.json]

ROOT is a folder with `coco`; `tests/fake_datasets.py ROOT` makes one without a download.
Both read JPEG and panoptic PNG, scale by 0.1 to 2, crop to 512 or 1024, mirror at random, and give the image
with a mask for each segment,
or with labels alone. Detectron2's part is its own reader and transforms (ResizeScale, FixedSizeCrop, RandomFlip)
and its advice for panoptic
maps (colours are transformed, and give an id for each pixel). All take turns image by image in one process;
times are CPU seconds of that process, the median of the rounds.
"""
import argparse, json, platform, statistics, time
from pathlib import Path
import numpy as np
import torch
from detectron2.data import detection_utils, transforms as T
from opentrans.files import save_text
from opentrans.data import open_dataset, read_augmented

torch.set_num_threads(1)

def detectron2_sample(data, i, side, augmentations, masks):
    "Image i as a mapper of detectron2 makes it."
    f = data.files[i]
    image = detection_utils.read_image(f.image, format='RGB')
    boxes = T.AugInput(image)
    transform = T.AugmentationList(augmentations)(boxes)
    colours = transform.apply_segmentation(detection_utils.read_image(f.labels, 'RGB')).astype(np.uint32)
    numbers = colours[..., 0] + 256*colours[..., 1] + 65536*colours[..., 2]
    labels = np.full(numbers.shape, 255, np.int64)
    found = []
    for segment in f.segments:
        mask = numbers == segment['id']
        labels[mask] = data.categories[segment['category_id']]
        if masks and not segment.get('iscrowd') and mask.any(): found.append(torch.from_numpy(mask))
    picture = torch.as_tensor(np.ascontiguousarray(boxes.image.transpose(2, 0, 1)))
    return picture, torch.from_numpy(labels), torch.stack(found) if found else torch.zeros(
        0, side, side, dtype=torch.bool)

def opentrans_sample(data, i, side, masks, turn):
    "Image i as `finetune` sees it."
    return read_augmented(data, i, side, [turn, i], (.1, 2.), .5, regions=masks)

def spent(make):
    "CPU seconds of one call."
    began = time.process_time()
    make()
    return time.process_time()-began

def compare(data, side, masks, images, rounds):
    "Milliseconds an image of both, image by image in turns."
    augmentations = [T.ResizeScale(.1, 2., side, side), T.FixedSizeCrop((side, side)), T.RandomFlip()]
    ours, theirs = [], []
    for turn in range(rounds):
        pairs = [(spent(lambda: opentrans_sample(data, i, side, masks, turn)),
                  spent(lambda: detectron2_sample(data, i, side, augmentations, masks))) for i in range(images)]
        ours.append(1e3*sum(a for a, _ in pairs)/images)
        theirs.append(1e3*sum(b for _, b in pairs)/images)
    return dict(opentrans_ms=statistics.median(ours), detectron2_ms=statistics.median(theirs),
                opentrans_images_a_second=1e3/statistics.median(ours),
                detectron2_images_a_second=1e3/statistics.median(theirs),
                speedup=statistics.median(b/a for a, b in zip(ours, theirs)),
                least=min(b/a for a, b in zip(ours, theirs)))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root')
    for name, value in (('images', 60), ('rounds', 5)): parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--out')
    told = parser.parse_args()
    data = open_dataset('coco_panoptic', told.root, 'train')
    images = min(told.images, len(data))
    result = dict(machine=platform.machine(), torch=torch.__version__, images=images, rounds=told.rounds,
                  size=list(data[0]['image'].shape[1:]), cores=1)
    for side in (512, 1024):
        for masks in (True, False):
            result[f"{side}, {'masks' if masks else 'labels'}"] = compare(data, side, masks, images, told.rounds)
    text = json.dumps(result, indent=1)
    print(text)
    if told.out: save_text(text+'\n', Path(told.out))

if __name__ == '__main__': main()
