"""Maps as DeepMind Lab compiles them, for tests of their cache."""

import os
import zipfile


def write_map(path, text):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('map', text)


def maps_in(folder):
    return [name for name in os.listdir(folder) if name.endswith('.pk3')]
