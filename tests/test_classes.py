"Words: what may be a class name or a template, and every form in which people keep lists of classes."
import json
import pytest
from hypothesis import given, settings, strategies as st
from mutations import COUNT, check_reader
import numpy as np
from opentrans.clip import class_prompts
from opentrans.data import VOCABULARIES, Vocabulary, check_templates, open_dataset
from opentrans.errors import FormatError, OpenTransError

# names and templates

@pytest.mark.parametrize('names',
                         [[1, 2], [1.5], [None], ['a', None], [b'a'], [['a', 1]], [['a', ['b']]], [[]], [['']],
                          [()], [''], [' '], [','], ['a,'], np.array([1, 2]), 7, None, True, b'ab', {'a': 0},
                          {0: 'a'}, {'a', 'b'}, frozenset('a'), [], '', ' ', 'a,,b', ['a', 'a'], ['a', ' a '],
                          ['x'*10**6], [['x'*2000]], ['\ud800'], object()])
def test_what_is_no_list_of_names_is_one_sentence(names):
    "A number, a set without order, or a name that no encoder can read."
    with pytest.raises(OpenTransError) as told: Vocabulary(names)
    assert len(str(told.value)) < 300 and '\n' not in str(told.value)

def test_lists_of_names_in_every_form():
    for names in (['sky', 'road'], ('sky', 'road'), (n for n in ('sky', 'road')), np.array(['sky', 'road']),
                  [['sky'], ['road']], 'sky, road', ['sky\n', '\troad'], dict.fromkeys(['sky', 'road']).keys()):
        if isinstance(names, type({}.keys())): # a view of keys has an order, but is a set to Python
            with pytest.raises(OpenTransError): Vocabulary(names)
        else: assert Vocabulary(names).names == ('sky', 'road')
    assert Vocabulary([['sofa', 'couch'], 'sea;side']).synonyms == (('sofa', 'couch'), ('sea;side',))

@pytest.mark.parametrize('template',
                         ['a {thing} {}', '{0:>2000000000}', '{:>2000000000}', '{0.__class__}', '{0}', '{name}',
                          '{!r}', '{} {}', '{}{}', '{', '{}}', '{{}}', '{ }', 'a photo', '', 5, None, b'{}',
                          '\ud800{}', '{}'+'x'*10**6, ['{}']])
def test_a_template_has_one_place_and_nothing_else(template):
    "What `str.format` would fill in besides, or make of it, is no prompt."
    for call in (lambda: Vocabulary(['a'], [template]), lambda: check_templates([template]),
                 lambda: class_prompts(['a'], [template])):
        with pytest.raises(OpenTransError) as told: call()
        assert len(str(told.value)) < 400

def test_braces_that_are_meant_stay():
    assert (Vocabulary(['a'], ['{{x}} {}']).prompts() == [['{x} a']]
            and Vocabulary(['{b}', 'a{}'], '{}').prompts() == [['{b}'], ['a{}']])

@pytest.mark.parametrize('templates', [[], (), None, 7, {'{}': 1}, {'{}'}, b'{}', 'none such', ['{}', 'photo']])
def test_templates_are_a_list_or_a_known_name(templates):
    with pytest.raises(OpenTransError): Vocabulary(['a'], templates)

def test_parts_of_a_vocabulary_are_there_or_told():
    v = Vocabulary('a,b')
    for bad in ([5], [-3], ['c'], [1.5], [True], [None], []):
        with pytest.raises(OpenTransError): v.subset(bad)
    for bad in (7, None, ['a'], 'x'*10**6):
        with pytest.raises(OpenTransError): v.index(bad)
    assert v.subset([-1]).names == ('b',)

# files of classes

WANTED = ('sky', 'traffic light')
FORMS = {'plain': 'sky\ntraffic light\n', 'byte-order mark': '\ufeffsky\ntraffic light',
         'byte-order mark within': 'sky\n\ufefftraffic light', 'CRLF': 'sky\r\ntraffic light\r\n',
         'CR': 'sky\rtraffic light\r', 'blanks': '\n\n  sky \n\n\ttraffic   light\n\n',
         'comments': '# classes\nsky\n#\ntraffic light', 'colon from 0': '0:sky\n1:traffic light',
         'colon and blank': '1: sky\n2: traffic light', 'colon with gaps': '3:sky\n11:traffic light',
         'void of FC-CLIP': '0:invalid_class_id\n1:sky\n2:traffic light',
         'number and blank': '0 sky\n1 traffic light', 'number and tab': '1\tsky\n2\ttraffic light',
         'number and dot': '1. sky\n2. traffic light', 'number and bracket': '0) sky\n1) traffic light',
         'number and dash': '0 - sky\n1 - traffic light', 'number behind': 'sky 0\ntraffic light 1',
         'number behind a colon': 'sky: 0\ntraffic light: 1', 'tab and number': 'sky\t0\ntraffic light\t1',
         'CSV with headings': 'id,name\n0,sky\n1,traffic light\n',
         'CSV, names first': 'name,id\nsky,0\ntraffic light,1\n', 'CSV without headings': '0,sky\n1,traffic light',
         'CSV with semicolons': 'id;name\n0;sky\n1;traffic light\n',
         'semicolons without headings': '0;sky\n1;traffic light',
         'CSV with quotes': 'id,name\r\n0,"sky"\r\n1,"traffic light"\r\n',
         'CSV with other columns': 'id,name,r,g,b\n0,sky,70,130,180\n1,traffic light,250,170,30',
         'CSV with capitals': 'Index,Class\n0,sky\n1,traffic light',
         'CSV of one column': 'name\nsky\ntraffic light', 'CSV with blanks': '0, sky\n1, traffic light',
         'TSV': 'Idx\tRatio\tName\n1\t0.3\tsky\n2\t0.1\ttraffic light', 'quotes': '"sky"\n"traffic light"',
         'YAML list': '- sky\n- traffic light', 'YAML mapping': 'names:\n  0: sky\n  1: traffic light',}

@pytest.mark.parametrize('form', FORMS)
def test_class_lists_in_every_form(form, tmp_path):
    "Editors, spreadsheets and other tools write the same names in many ways."
    for name in ('x.txt', 'x.csv', 'X.TXT'):
        (tmp_path/name).write_bytes(FORMS[form].encode())
        assert Vocabulary.from_file(tmp_path/name).names == WANTED

def test_synonyms_in_files(tmp_path):
    path = tmp_path/'x.txt'
    for text in ('sea,ocean\nbed, beds', '1:sea,ocean\n2:bed,beds', '0 sea,ocean\n1 bed,beds',
                 'id,name\n0,"sea, ocean"\n1,bed;beds', 'Idx\tName\n1\tsea;ocean\n2\tbed;beds'):
        path.write_text(text)
        assert Vocabulary.from_file(path).synonyms == (('sea', 'ocean'), ('bed', 'beds')), text

def test_numbers_that_belong_to_names_stay(tmp_path):
    path = tmp_path/'x.txt'
    for text in ('2 persons\n3 persons', '7 up\nroad', 'boeing 747\nairbus 320', 'sky', '1 bed\n1 table',
                 '4x4\n5x5'):
        path.write_text(text)
        assert Vocabulary.from_file(path).names == tuple(text.split('\n'))

DOUBTFUL = {'empty': (b'', 'no lines'), 'only comments': (b'# a\n\n', 'no lines'), 'twice': (b'sky\nsky', 'twice'),
            'no order': (b'1:road\n0:sky', 'after number'),
            'CSV without order': (b'id,name\n1,road\n0,sky', 'after number'),
            'one number twice': (b'0,sky\n0,road', 'after number'),
            'one line of commas': (b'sky,road,car', 'only line has commas'), 'tabs': (b'sky\troad', 'tabs'),
            'which column': (b'0,sky,1\n1,road,2', 'which of its 3 columns'),
            'ragged': (b'id,name\n0,sky\n1,road,street', 'columns'),
            'UTF-16': ('sky\nroad'.encode('utf-16'), 'UTF-8'),
            'UTF-16 without mark': ('sky\nroad'.encode('utf-16-le'), 'zero bytes'),
            'Latin-1': ('caf\xe9'.encode('latin-1'), 'UTF-8'), 'JSON': (b'["sky", "road"]', 'like JSON'),
            'empty names': (b'0:\n1:sky', 'empty name'), 'picture': (b'\x89PNG\r\n\x1a\n\0\0', 'UTF-8'),
            'long': (b'x'*10**6, 'characters'), 'very large': (b'a\n'*10**7, 'at most'),
            'YAML of a data set': (b'path: ../street\ntrain: images\nnames:\n  0: sky\n  1: road\n', 'key of YAML'),
            'YAML with brackets': (b'nc: 2\nnames: [sky, road]\n', 'key of YAML'),
            'YAML with more behind': (b'names:\n  0: sky\n  1: road\nnc: 2\n', 'key of YAML'),
            'headings only': (b'id,name\n', 'at least one'),}

@pytest.mark.parametrize('form', DOUBTFUL)
def test_class_lists_that_could_mean_two_things_are_refused(form, tmp_path):
    "A guess that is wrong gives every class another name, without a word."
    data, said = DOUBTFUL[form]
    (tmp_path/'x.txt').write_bytes(data)
    with pytest.raises(OpenTransError, match=said) as told: Vocabulary.from_file(tmp_path/'x.txt')
    assert 'x.txt' in str(told.value) and len(str(told.value)) < 500

GOOD = dict(templates=['a photo of a {}.', '{}'], names=['sea,ocean', ['bed', 'beds'], 'sky'])

def test_json_vocabularies(tmp_path):
    for text in (json.dumps(GOOD), '\ufeff'+json.dumps(GOOD), json.dumps(dict(GOOD, more=[1], note='x'))):
        (tmp_path/'x.JSON').write_text(text)
        assert Vocabulary.from_file(tmp_path/'x.JSON').entries == ('sea,ocean', 'bed,beds', 'sky')
        assert Vocabulary.from_file(tmp_path/'x.JSON', 'photo').templates == ('a photo of a {}.',)
    for bad in (dict(GOOD, names=[1]), dict(GOOD, names='sky'), dict(GOOD, names={'0': 'sky'}),
                dict(GOOD, templates=[1]), dict(GOOD, templates=['{0.__class__}']),
                dict(GOOD, names=[['a', ['b']]]), dict(templates=['{}']), ['sky'], None, 'sky', 5):
        (tmp_path/'x.json').write_text(json.dumps(bad))
        with pytest.raises(FormatError, match='x.json.*is not a vocabulary'):
            Vocabulary.from_file(tmp_path/'x.json')

def test_mutated_vocabulary_files_are_read_or_told(tmp_path):
    for name, data in (('x.json', json.dumps(GOOD)), ('y.txt', FORMS['colon from 0']),
                       ('z.csv', FORMS['CSV with other columns']), ('w.tsv', FORMS['TSV'])):
        good = tmp_path/name
        good.write_text(data)
        results = []
        try:
            check_reader(good, lambda _, path: results.append(Vocabulary.from_file(path)),
                         count=COUNT if name == 'x.json' else COUNT//4)
        except AssertionError as error:
            if 'only' not in str(error): raise # most changes of a text leave a text
        for v in results:
            assert (len(set(v.names)) == len(v) and v.prompts()
                    and all(isinstance(word, str) for words in v.synonyms for word in words))

@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode('utf-8', 'surrogatepass')))
def test_any_bytes_are_a_vocabulary_or_told(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp()/'any.txt'
    path.write_bytes(data)
    try: v = Vocabulary.from_file(path)
    except OpenTransError: return
    v.to_file(path.with_suffix('.json'))
    assert Vocabulary.from_file(path.with_suffix('.json')) == v

def test_a_name_that_looks_like_a_file_is_one(tmp_path):
    "A list of classes in `classes.csv` must not become a class of that name."
    (tmp_path/'classes.csv').write_text(FORMS['CSV with headings'])
    for kind in ('images', 'labels'): (tmp_path/kind).mkdir()
    from PIL import Image
    for kind in ('images', 'labels'): Image.new('L', (4, 4)).save(tmp_path/kind/'a.png')
    for names in (tmp_path/'classes.csv', str(tmp_path/'classes.csv')):
        assert open_dataset('folder', tmp_path, names=names).vocabulary.names == WANTED
    with pytest.raises(OpenTransError, match='none.csv'): open_dataset('folder', tmp_path, names='none.csv')

def test_the_vocabularies_of_the_package_pass_every_check():
    for name, v in VOCABULARIES.items(): assert Vocabulary(v.entries, v.templates) == v, name
