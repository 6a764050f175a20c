"""Trees of files that look like COCO-panoptic and the six other data sets of the paper, made of generated scenes of
real sizes.

python tests/fake_datasets.py ROOT                       2,000 scenes for COCO, 40 for each other set (about two
minutes, 400 MB)
python tests/fake_datasets.py ROOT --train 200 --val 20  a smaller tree

What is learned from these scenes means nothing. They are for running the commands of the README end to end, and
for measuring time and memory.
"""
import argparse, json
from pathlib import Path
import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent/'opentrans'/'assets'

def vocabulary(name):
    "What the package knows of a data set's classes."
    return json.loads((ASSETS/f'vocab_{name}.json').read_text(encoding='utf-8'))

def scene(rng, width, height, classes, segments=11, cell=8):
    "A picture (H,W,3), the number of each pixel's segment from 1 on (H,W), and the class of each segment."
    rows, cols = -(-height//cell), -(-width//cell)
    seeds = rng.uniform(0, 1, (segments, 2))*(rows, cols)
    y, x = np.mgrid[:rows, :cols]
    distance = (y[..., None]-seeds[:, 0])**2 + (x[..., None]-seeds[:, 1])**2
    coarse = distance.argmin(-1)
    present, coarse = np.unique(coarse, return_inverse=True)
    numbers = coarse.reshape(rows, cols).repeat(cell, 0).repeat(cell, 1)[:height, :width] + 1
    kinds = rng.integers(classes, size=len(present))
    colours = np.stack([kinds*67 % 256, kinds*151 % 256, kinds*211 % 256], -1)
    picture = colours[numbers-1] + rng.normal(0, 14, (height, width, 1))
    return picture.clip(0, 255).astype(np.uint8), numbers.astype(np.uint16), kinds

def save_jpeg(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=90)

def save_png(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, compress_level=1)

def segment_row(numbers, number, category, isthing):
    "What COCO's JSON file says of one segment."
    ys, xs = np.nonzero(numbers == number)
    box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)+1), int(np.ptp(ys)+1)]
    return dict(id=int(number), category_id=int(category), iscrowd=0, area=len(ys), bbox=box, isthing=int(isthing))

def make_coco(root, split, count, seed=0, width=640, height=480):
    "COCO-panoptic in detectron2's layout, with the 133 names and all fields of the JSON file."
    words = vocabulary('coco_panoptic')
    things = set(words['things'])
    images, annotations = [], []
    for i in range(count):
        turned = i % 5 == 4 # as in COCO, some pictures are upright
        size = (height, width) if turned else (width, height)
        picture, numbers, kinds = scene(np.random.default_rng([seed, i]), *size, classes=133)
        name = f'{i+1:012}'
        save_jpeg(picture, root/f'coco/{split}2017/{name}.jpg')
        maps = np.stack([numbers % 256, numbers//256, np.zeros_like(numbers)], -1).astype(np.uint8)
        save_png(maps, root/f'coco/panoptic_{split}2017/{name}.png')
        images.append(dict(id=i+1, file_name=f'{name}.jpg', width=size[0], height=size[1], license=1,
                           date_captured='2013-11-14 11:18:45', coco_url='', flickr_url=''))
        rows = [segment_row(numbers, k+1, words['ids'][c], c in things) for k, c in enumerate(kinds)]
        annotations.append(dict(image_id=i+1, file_name=f'{name}.png', segments_info=rows))
    categories = [dict(id=k, name=n, isthing=int(c in things), supercategory='any')
                  for c, (k, n) in enumerate(zip(words['ids'], words['official']))]
    path = root/f'coco/annotations/panoptic_{split}2017.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(dict(info=dict(description='generated scenes'), licenses=[dict(id=1, name='none', url='')],
                        images=images, annotations=annotations, categories=categories)))

# name -> (folder of images, folder of labels, size, classes, value of pixels that are not judged, suffix of labels)
LABEL_MAPS = {'ade20k_150': ('ADEChallengeData2016/images', 'ADEChallengeData2016/annotations_detectron2',
                             (683, 512), 255, '.png'),
              'ade20k_847': ('ADE20K_2021_17_01/images_detectron2', 'ADE20K_2021_17_01/annotations_detectron2',
                             (1024, 768), 65535, '.tif'),
              'context_59': ('pascal_ctx_d2/images', 'pascal_ctx_d2/annotations_ctx59', (500, 375), 255, '.png'),
              'context_459': ('pascal_ctx_d2/images', 'pascal_ctx_d2/annotations_ctx459', (500, 375), 65535,
                              '.tif'),
              'voc_20': ('pascal_voc_d2/images', 'pascal_voc_d2/annotations_pascal20', (500, 375), 255, '.png'),}

def make_label_maps(root, name, count, seed=1, folder='validation'):
    "One of the sets of label maps; one segment a scene is not judged."
    images, labels, size, void, suffix = LABEL_MAPS[name]
    classes = len(vocabulary(name)['names'])
    kind = np.uint16 if void > 255 else np.uint8
    for i in range(count):
        picture, numbers, kinds = scene(np.random.default_rng([seed, i]), *size, classes=classes)
        values = np.append(kinds[1:], void).astype(kind)
        save_jpeg(picture, root/images/folder/f'scene_{i:08}.jpg')
        save_png_or_tif = save_png if suffix == '.png' else save_tif
        save_png_or_tif(values[numbers-1], root/labels/folder/f'scene_{i:08}{suffix}')

def save_tif(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, compression='tiff_lzw')

def make_cityscapes(root, count, split='val', seed=2):
    "Cityscapes with the label ids that it is published with."
    ids = vocabulary('cityscapes_19')['ids']
    for i in range(count):
        picture, numbers, kinds = scene(np.random.default_rng([seed, i]), 2048, 1024, classes=19, cell=16)
        values = np.append(np.array(ids)[kinds[1:]], 0).astype(np.uint8)
        name = f'frankfurt_000000_{i:06}'
        save_png(picture, root/f'cityscapes/leftImg8bit/{split}/frankfurt/{name}_leftImg8bit.png')
        save_png(values[numbers-1], root/f'cityscapes/gtFine/{split}/frankfurt/{name}_gtFine_labelIds.png')

def make_all(root, train=2000, val=40):
    "All seven data sets under one folder."
    root = Path(root)
    make_coco(root, 'train', train)
    make_coco(root, 'val', val, seed=3)
    for name in LABEL_MAPS: make_label_maps(root, name, val)
    make_cityscapes(root, val)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('root', help='folder to write; it is made')
    parser.add_argument('--train', type=int, default=2000, help='scenes of COCO to train on')
    parser.add_argument('--val', type=int, default=40, help='scenes of each set to evaluate on')
    given = parser.parse_args()
    make_all(given.root, given.train, given.val)
