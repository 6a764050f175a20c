"""Every way in which a picture or a label map can be stored: what is read is what is in the file, or one sentence
says why not."""
import io, json, os, struct, warnings, zlib
import numpy as np
import pytest
import torch
from PIL import Image
from forked import Forked
from mutations import COUNT, mutated
from opentrans.data import read_image, read_label_map, read_picture, read_segments
from opentrans.errors import OpenTransError
from opentrans.playground import to_image

GREY = np.linspace(0, 255, 20*24).astype(np.uint8).reshape(20, 24)
RGB = np.stack([GREY, GREY.T.reshape(20, 24), 255-GREY], -1)

def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))

def png(rows, width, bits, colour, size=None):
    """A PNG of packed rows, also of the depths that Pillow does not write. `colour`: 0 grey, 2 RGB, 4 grey and
    alpha, 6 RGB and alpha."""
    head = struct.pack('>IIBBBBB', *(size or (width, len(rows))), bits, colour, 0, 0, 0)
    body = zlib.compress(b''.join(b'\0'+bytes(row) for row in rows))
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+chunk(b'IDAT', body)+chunk(b'IEND', b'')

def tiff(data, width, height, bits, kind=1, order='<', photometric=1):
    "A TIFF of one channel. `kind`: 1 unsigned, 2 signed, 3 floating point."
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8+2+10*12+4), (277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, kind)]
    entries = b''.join(struct.pack(f'{order}HHI', tag, size, 1)
                       + (struct.pack(f'{order}HH', value, 0) if size == 3 else struct.pack(f'{order}I', value))
                       for tag, size, value in tags)
    return (b'II' if order == '<' else b'MM')+struct.pack(f'{order}HIH', 42, 8, len(tags))+entries+bytes(4)+data

def saved(array_or_image, kind, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()

def three(grey): return torch.from_numpy(np.array(grey)).expand(3, *grey.shape)

# pictures

DEEP = GREY.astype(np.uint16)*257
PICTURES = {'8 bit PNG': saved(GREY, 'PNG'), '16 bit PNG': saved(DEEP, 'PNG'), '16 bit TIFF': saved(DEEP, 'TIFF'),
            '16 bit TIFF, compressed': saved(DEEP, 'TIFF', compression='tiff_lzw'),
            '16 bit TIFF, big-endian': saved(DEEP.astype('>u2'), 'TIFF'),
            '16 bit TIFF, 0 is white': tiff((65535-DEEP).tobytes(), 24, 20, 16, photometric=0),
            '8 bit TIFF, 0 is white': tiff((255-GREY).tobytes(), 24, 20, 8, photometric=0),
            '16 bit RGB PNG': png([np.repeat(row, 3).astype('>u2').tobytes() for row in DEEP], 24, 16, 2),
            '16 bit PGM': b'P5 24 20 65535\n'+DEEP.astype('>u2').tobytes(),
            'two channels': saved(np.stack([GREY, GREY//2], -1), 'PNG'),
            '16 bit, two channels': png([np.stack([r, r//2], -1).astype('>u2').tobytes() for r in DEEP], 24, 16,
                                        4), 'BMP': saved(GREY, 'BMP'), 'GIF': saved(GREY, 'GIF'),
            'lossless WebP': saved(Image.fromarray(GREY).convert('RGB'), 'WEBP', lossless=True),}

@pytest.mark.parametrize('kind', PICTURES)
def test_a_grey_picture_is_the_same_however_it_is_stored(kind, tmp_path):
    "Bits, byte order, packing and container are no part of what is seen."
    path = tmp_path/'x.png' # the name is no promise: contents tell the kind
    path.write_bytes(PICTURES[kind])
    for source in (PICTURES[kind], path, str(path), io.BytesIO(PICTURES[kind]).getbuffer()):
        assert torch.equal(read_picture(source), three(GREY))
    assert torch.equal(read_image(path), three(GREY))
    with Image.open(path) as image: assert torch.equal(read_picture(image), three(GREY))
    if 'two channels' not in kind:
        assert torch.equal((to_image(path)*255).round().byte(),
                           three(GREY)), 'the command reads pictures as data sets do'

def test_twelve_bits_are_dark_in_sixteen_unless_the_file_says_twelve():
    "Nothing in a 16-bit file tells that only 12 bits of it were used."
    twelve = ((GREY.astype(int)*4095+127)//255).astype(np.uint16)
    assert torch.equal(read_picture(saved(twelve, 'PNG')),
                       three(((twelve.astype(int)*255+32767)//65535).astype(np.uint8)))
    bits = ''.join(f'{v:012b}' for v in twelve.ravel())
    packed = bytes(int(bits[i:i+8], 2) for i in range(0, len(bits), 8))
    assert torch.equal(read_picture(tiff(packed, 24, 20, 12)), three(GREY))
    assert torch.equal(read_picture(b'P5 24 20 4095\n'+twelve.astype('>u2').tobytes()),
                       three(GREY)), 'a PGM says how large its numbers are'

def test_sixteen_bits_are_rounded_and_never_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert torch.equal(read_picture(saved(values, 'PNG'))[0].ravel(),
                       torch.from_numpy(np.round(values.ravel()/257).astype(np.uint8)))

NO_WHITE = {'int32 TIFF': tiff(GREY.astype('<i4').tobytes(), 24, 20, 32, 2),
            'uint32 TIFF': tiff(GREY.astype('<u4').tobytes(), 24, 20, 32),
            'float TIFF': tiff((GREY/255).astype('<f4').tobytes(), 24, 20, 32, 3),
            'int16 TIFF': tiff(GREY.astype('<i2').tobytes(), 24, 20, 16, 2),
            'int8 TIFF': tiff(GREY.tobytes(), 24, 20, 8, 2),
            'PFM': b'Pf\n24 20\n-1.0\n'+(GREY/255).astype('<f4').tobytes(),}

@pytest.mark.parametrize('kind', NO_WHITE)
def test_numbers_without_a_known_white_are_refused(kind, tmp_path):
    "No guess is right for all of them, and a clipped picture is white or black without a word."
    (tmp_path/'x.tif').write_bytes(NO_WHITE[kind])
    for read in (read_picture, read_image, to_image):
        with pytest.raises(OpenTransError,
                           match=r"x.tif' holds .* which of them is white\. Save it with 8 or 16 bits"):
            read(tmp_path/'x.tif')

@pytest.mark.parametrize('mode',
                         ['1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'HSV'])
def test_every_mode_of_pillow_is_read_as_pillow_shows_it(mode):
    image = Image.fromarray(RGB)
    for step in {'La': ('LA', 'La'), 'PA': ('P', 'PA'), 'RGBa': ('RGBA', 'RGBa')}.get(mode, (mode,)):
        image = image.convert(step)
    try: shown = image.convert('RGB')
    except ValueError: shown = image.convert({'La': 'LA', 'RGBa': 'RGBA'}[mode]).convert('RGB')
    assert torch.equal(read_picture(image), torch.from_numpy(np.array(shown)).permute(2, 0, 1))

def test_lab_is_read_or_refused():
    "Pillow converts it since version 12."
    try: assert read_picture(Image.new('LAB', (20, 20), (0, 128, 128))).shape == (3, 20, 20)
    except OpenTransError as error: assert 'cannot be read: conversion from LAB' in str(error)

def test_transparency_is_dropped_or_laid_on_a_colour():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([255, 0, 0, 0, 0, 255]+[0]*762)
    stored = saved(palette, 'PNG', transparency=0)
    assert read_picture(stored)[:,0].T.tolist() == [[255, 0, 0],
                                                    [0, 0, 255]], 'the colours are kept as they are stored'
    assert read_picture(stored, background='white')[:,0].T.tolist() == [[255, 255, 255], [0, 0, 255]]
    assert read_picture(saved(np.array([[[9, 0], [9, 255]]], np.uint8), 'PNG'),
                        background='white')[0].tolist() == [[255, 9]]

@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_that_of_the_camera(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    for kind, picture in (('PNG', RGB), ('TIFF', RGB), ('PNG', DEEP), ('TIFF', DEEP)):
        straight = read_picture(saved(picture, kind))
        turned = {1: straight, 2: straight.flip(2), 3: straight.flip(1, 2), 4: straight.flip(1),
                  5: straight.transpose(1, 2), 6: straight.rot90(-1, (1, 2)),
                  7: straight.transpose(1, 2).flip(1, 2), 8: straight.rot90(1, (1, 2))}[orientation]
        assert torch.equal(read_picture(saved(picture, kind, exif=exif)), turned), f'{kind}, {picture.dtype}'

def test_first_frames_and_first_pages():
    frames = [Image.fromarray(np.full((20, 20, 3), v, np.uint8)) for v in (10, 200)]
    for kind in ('GIF', 'TIFF', 'PNG', 'WEBP'):
        options = dict(lossless=True) if kind == 'WEBP' else {}
        assert (
            read_picture(saved(frames[0], kind, save_all=True, append_images=frames[1:],
                               **options)) == 10).all(), kind

def test_one_pixel():
    assert read_picture(saved(np.array([[7]], np.uint8), 'PNG')).tolist() == [[[7]]]*3

@pytest.mark.parametrize('values',
                         [GREY, GREY[..., None], RGB, np.dstack([RGB, np.full_like(GREY, 255)]), DEEP,
                          DEEP.astype('>u2'), GREY/255, (RGB/255).astype(np.float32), GREY > 100,
                          torch.from_numpy(RGB).permute(2, 0, 1), torch.from_numpy(RGB).permute(2, 0, 1)/255,
                          (torch.from_numpy(RGB).permute(2, 0, 1)/255).bfloat16()])
def test_arrays_and_tensors_are_pictures_too(values):
    if values.dtype == bool: want = three(GREY > 100).byte()*255
    elif values.ndim == 2 or values.shape[-1] == 1: want = three(GREY)
    else: want = torch.from_numpy(RGB).permute(2, 0, 1)
    apart = (read_picture(values).int()-want.int()).abs().max()
    assert apart <= (values.dtype == torch.bfloat16), 'a picture of bytes was read as white'
    assert (to_image(values)*255-want).abs().max() < 1.5

@pytest.mark.parametrize('values',
                         [RGB.astype(np.int64), RGB.astype(np.float32), np.full((20, 20), np.nan), RGB/255-2,
                          torch.zeros(1, 20, 20), torch.zeros(20, 20), np.zeros((3, 20, 20), np.uint8),
                          np.zeros((0, 20, 3), np.uint8), np.zeros((2, 20, 20, 3), np.uint8), None, 7, [[1]],
                          object(), Image.new('RGB', (0, 20))])
def test_what_is_no_picture_is_refused(values):
    for read in (read_picture, to_image):
        with pytest.raises(OpenTransError): read(values)

# label maps

LABELS = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
def packed(bits):
    return [int(''.join(f'{v:0{bits}b}' for v in row).ljust(8, '0'), 2).to_bytes(1 if bits < 4 else 2)
            for row in LABELS]

palette = Image.fromarray(LABELS)
palette.putpalette(list(range(255, -1, -1))*3)
MAPS = {'8 bit': saved(LABELS, 'PNG'), '16 bit PNG': saved(LABELS.astype(np.uint16), 'PNG'),
        '16 bit TIFF': saved(LABELS.astype(np.uint16), 'TIFF'),
        'big-endian TIFF': saved(LABELS.astype('>u2'), 'TIFF'),
        'int32 TIFF': saved(LABELS.astype(np.int32), 'TIFF'),
        'int16 TIFF': tiff(LABELS.astype('<i2').tobytes(), 4, 2, 16, 2),
        'int8 TIFF': tiff(LABELS.tobytes(), 4, 2, 8, 2),
        'uint32 TIFF': tiff(LABELS.astype('<u4').tobytes(), 4, 2, 32), 'palette': saved(palette, 'PNG'),
        'palette of 4 bits': saved(palette, 'PNG', bits=4),
        'palette with a transparent colour': saved(palette, 'PNG', transparency=0),
        'palette TIFF': saved(palette, 'TIFF'), '2 bit PNG': png(packed(2), 4, 2, 0),
        '4 bit PNG': png(packed(4), 4, 4, 0), '2 bit TIFF': tiff(b''.join(packed(2)), 4, 2, 2),
        '4 bit TIFF': tiff(b''.join(packed(4)), 4, 2, 4),}

@pytest.mark.parametrize('kind', MAPS)
def test_the_numbers_of_a_label_map_are_those_of_the_file(kind, tmp_path):
    "A number that is scaled or taken from the colour of a palette is another class."
    (tmp_path/'x.png').write_bytes(MAPS[kind])
    assert np.array_equal(read_label_map(tmp_path/'x.png'), LABELS)
    assert read_label_map(tmp_path/'x.png').dtype.isnative

def test_one_bit_is_two_classes(tmp_path):
    for kind in ('PNG', 'TIFF'):
        (tmp_path/'x.png').write_bytes(saved(Image.fromarray(LABELS > 1), kind))
        assert (np.array_equal(read_label_map(tmp_path/'x.png'), LABELS > 1)
                and read_label_map(tmp_path/'x.png').dtype == np.uint8)

def test_negative_and_large_numbers_stay_what_they_are(tmp_path):
    for values in (np.array([[-1, 2]], np.int32), np.array([[2**31-1, 70000]], np.int32)):
        Image.fromarray(values).save(tmp_path/'x.tif')
        assert np.array_equal(read_label_map(tmp_path/'x.tif'), values)
    (tmp_path/'x.tif').write_bytes(tiff(np.array([-1, 2], np.int8).tobytes(), 2, 1, 8, 2))
    assert read_label_map(tmp_path/'x.tif').tolist() == [[-1, 2]], '-1 must not become 255, which counts nowhere'

NO_MAP = {'colours': (saved(RGB, 'PNG'), 'not colours'),
          'colours of a grey': (saved(np.dstack([GREY]*3), 'PNG'), 'not colours'),
          'two channels': (PICTURES['two channels'], 'not colours'),
          'alpha': (saved(np.dstack([RGB, GREY]), 'PNG'), 'not colours'),
          'fractions': (NO_WHITE['float TIFF'], 'not fractions'),
          'JPEG': (saved(GREY, 'JPEG'), 'a JPEG, in which numbers are not exact'),
          'negative': (PICTURES['8 bit TIFF, 0 is white'], 'is a negative'),
          'pages': (saved(Image.fromarray(LABELS), 'TIFF', save_all=True, append_images=[Image.fromarray(LABELS)]),
                    'several pages'),}

@pytest.mark.parametrize('kind', NO_MAP)
def test_what_holds_no_exact_numbers_is_no_label_map(kind, tmp_path):
    data, said = NO_MAP[kind]
    (tmp_path/'x.png').write_bytes(data)
    with pytest.raises(OpenTransError, match=f"label map '.*x.png' .*{said}"): read_label_map(tmp_path/'x.png')

def test_a_small_second_page_is_a_preview(tmp_path):
    "Map servers add smaller copies of a TIFF as further pages."
    Image.fromarray(LABELS).save(tmp_path/'x.tif', save_all=True, append_images=[Image.fromarray(LABELS[:1,:2])])
    assert np.array_equal(read_label_map(tmp_path/'x.tif'), LABELS)

def test_segment_numbers_are_those_of_three_bytes(tmp_path):
    path = tmp_path/'x.png'
    for a in (RGB, np.dstack([RGB, GREY])):
        Image.fromarray(a).save(path)
        assert np.array_equal(read_segments(path), a[..., :3].astype(int) @ [1, 256, 65536])
    for data, said in ((saved(GREY, 'PNG'), 'expected colours'), (PICTURES['two channels'], 'expected colours'),
                       (saved(palette, 'PNG'), 'expected colours'),
                       (saved(Image.fromarray(RGB).convert('CMYK'), 'TIFF'), 'expected colours'),
                       (PICTURES['16 bit RGB PNG'], '16 bits a channel'), (saved(RGB, 'JPEG'), 'a JPEG')):
        path.write_bytes(data)
        with pytest.raises(OpenTransError, match=f"panoptic map '.*x.png' .*{said}"): read_segments(path)

# files that are no whole picture

READERS = dict(image=read_image, picture=read_picture, label=read_label_map, segments=read_segments,
               command=to_image)

def test_paths_that_are_no_ordinary_files_do_not_hang(tmp_path):
    "Opening a pipe waits for a writer, and /dev/zero never ends. The child process would be killed by its timeout."
    os.mkfifo(tmp_path/'pipe.png')
    (tmp_path/'link.png').symlink_to(tmp_path/'pipe.png')
    (tmp_path/'folder.png').mkdir()
    (tmp_path/'loop.png').symlink_to(tmp_path/'loop.png')
    paths = [*(str(tmp_path/n) for n in ('pipe.png', 'link.png', 'folder.png', 'loop.png', 'none.png')),
             '/dev/zero', '/dev/null', '', 'x'*5000, 'a\0b']
    code = """if True:
        import json, sys
        from opentrans.data import read_image, read_label_map, read_picture, read_segments
        from opentrans.errors import OpenTransError
        from opentrans.playground import to_image
        for read in (read_image, read_label_map, read_picture, read_segments, to_image):
            for path in json.loads(sys.argv[1]):
                try: read(path)
                except OpenTransError as error: print(str(error)[:250])
                else: print('read')
        """
    out = Forked(['-c', code, json.dumps(paths)], dict(os.environ), tmp_path, tmp_path).result(300)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert len(lines) == 5*len(paths) and 'read' not in lines
    for said in np.reshape(lines, (5, -1)):
        assert ('pipe or a device' in said[0] and 'pipe or a device' in said[1] and 'folder' in said[2]
                and 'is missing' in said[4] and 'device' in said[5])

@pytest.mark.parametrize('name', READERS)
def test_a_bomb_is_told_before_it_is_unpacked(name, tmp_path):
    "A file of a few bytes that says it has 10^10 pixels."
    path = tmp_path/'bomb.png'
    path.write_bytes(png([b'\0'], 1, 8, 0, size=(100_000, 100_000)))
    with pytest.raises(OpenTransError, match=r"bomb.png' cannot be read: it has more than [\d,]+ pixels"):
        READERS[name](path)

def test_a_warning_that_is_made_an_error_is_one_sentence(tmp_path):
    "Pillow warns of large pictures; under `-W error` its warning is an exception of its own kind."
    path = tmp_path/'large.png'
    path.write_bytes(png([b'\0'], 1, 8, 0, size=(10_000, 10_000)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(OpenTransError, match="large.png' cannot be read"): read_image(path)

def test_no_other_program_is_started(tmp_path):
    "Pillow hands EPS to Ghostscript, which runs what the file says."
    path = tmp_path/'x.png'
    path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n')
    with Image.open(path) as image: assert image.format == 'EPS', 'Pillow itself would have taken it'
    with pytest.raises(OpenTransError, match='not an image of a known kind'): read_image(path)

def mended(data):
    "A PNG whose checksums fit again, so that a change gets past them."
    out, at = bytearray(data), 8
    while at+12 <= len(out):
        size = int.from_bytes(out[at:at+4])
        if at+12+size > len(out): break
        out[at+8+size:at+12+size] = zlib.crc32(out[at+4:at+8+size]).to_bytes(4)
        at += 12+size
    return bytes(out)

@pytest.mark.parametrize('name', ['label', 'segments', 'picture'])
@pytest.mark.filterwarnings('ignore')
def test_mutated_files_are_read_or_told(name, tmp_path):
    "Whatever a damaged file makes Pillow do, what comes out is a map or a sentence."
    sources = dict(label=[MAPS[k]
                          for k in ('8 bit', '16 bit TIFF', 'palette', '4 bit PNG', 'int32 TIFF',
                                    'big-endian TIFF')]+[saved(LABELS, 'TIFF', compression='tiff_lzw')],
                   segments=[saved(RGB, 'PNG'), saved(RGB, 'TIFF')],
                   picture=[*PICTURES.values(), saved(RGB, 'JPEG'), saved(RGB, 'TIFF', compression='jpeg'),
                            saved(RGB, 'JPEG2000')])[name]
    rng = np.random.default_rng(0)
    path = tmp_path/'x.png'
    told = 0
    for i in range(COUNT):
        data = mutated(sources[i % len(sources)], rng)
        path.write_bytes(mended(data) if rng.random() < .5 and data.startswith(b'\x89PNG') else data)
        try: a = READERS[name](path)
        except OpenTransError as error:
            told += 1
            assert 'x.png' in str(error) and len(str(error)) < 600 and '\n' not in str(error)
        else:
            assert (a.ndim == (3 if name == 'picture' else 2)
                    and (a.dtype == torch.uint8 if name == 'picture' else a.dtype.kind in 'ui'))
    assert told > COUNT/10, 'the mutations damage hardly anything'
