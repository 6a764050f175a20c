"Packaging of opentrans. Every fact stands in settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

extras = {
    'dev': cfg['dev_requirements'].split(),
    # detectron2 has no release on the package index: this names its public repository.
    # Its build imports torch, so: pip install --no-build-isolation
    'detectron2': ['detectron2 @ git+https://github.com/facebookresearch/detectron2', 'hydra-core', 'omegaconf', 'yacs',
                   'tabulate', 'cloudpickle', 'pycocotools'],
    'cluster': cfg['cluster_requirements'].split(),
    'docs': cfg['docs_requirements'].split(),
    'photo': cfg['photo_requirements'].split(), # weights of photo-lite0
    'tensorboard': ['tensorboard'],
    'onnx': ['onnx', 'onnxscript', 'onnxruntime'],
    'bench': ['weightwatcher', 'torch-pruning', 'cka-pytorch', 'torch-cka', 'ptflops', 'fvcore', 'thop'],
}

module_index = f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'License :: OSI Approved :: Apache Software License', 'Natural Language :: English',
                 'Programming Language :: Python :: 3'],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['opentrans', 'opentrans.*']),
    package_data={'opentrans': ['assets/*', 'py.typed', '*.pyi']},
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [module_index]},
    zip_safe=False,
)
