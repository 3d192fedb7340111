"""Compiles the C++ libraries; all else about the installation is in pyproject.toml.

The three libraries named `_ops` hold custom TensorFlow ops and are built against the installed
TensorFlow; `dynamic_batching._actor_client` is what actor processes load and does not use it.
"""

import glob
import os
import shutil
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ACTOR_CLIENT = 'dynamic_batching._actor_client'
CLIENT_SOURCES = [
    f'dynamic_batching/cc/{name}.cc' for name in ('actor_client', 'group_client', 'row_batcher')
]
OP_SOURCES = {
    'dynamic_batching._ops': sorted(set(glob.glob('dynamic_batching/cc/*.cc')) - {*CLIENT_SOURCES}),
    'impala.cluster._ops': sorted(glob.glob('impala/cluster/cc/*.cc')),
    'impala.learning.optimizers._ops': sorted(glob.glob('impala/learning/optimizers/cc/*.cc')),
}
HEADERS = glob.glob('dynamic_batching/cc/*.h') + glob.glob('impala/**/cc/*.h', recursive=True)
# Without errno the compiler may take roots of several numbers at once.
OPTIMIZE = ['-O3', '-fno-math-errno', '-fvisibility=hidden', '-Wall', '-Wno-sign-compare']


class BuildWithTensorFlow(build_ext):
    """Adds the installed TensorFlow's compile and link flags to the libraries of ops.

    Compiles as many libraries at once as there are processors.
    """

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        if shutil.which('g++') is None:
            sys.exit(
                'A C++ compiler is needed to build the TensorFlow ops and g++ was not found; '
                'install it (Debian, Ubuntu: apt-get install g++ make) and run this again.'
            )
        for extension in self.extensions:
            if extension.name != ACTOR_CLIENT:
                os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
                import tensorflow as tf

                # As system headers, since TensorFlow's own warn about each other.
                extension.extra_compile_args += [
                    flag.replace('-I', '-isystem', 1) if flag.startswith('-I') else flag
                    for flag in tf.sysconfig.get_compile_flags()
                ]
                extension.extra_link_args += tf.sysconfig.get_link_flags()
        super().build_extensions()


def cpp_extension(name: str, sources: list[str], flags: list[str]) -> Extension:
    """Returns an extension module of C++ sources, whose includes start at the project folder."""
    return Extension(
        name,
        sources,
        include_dirs=['.'],
        depends=HEADERS,
        language='c++',
        extra_compile_args=[*OPTIMIZE, *flags],
    )


setup(
    ext_modules=[
        *[cpp_extension(name, sources, []) for name, sources in OP_SOURCES.items()],
        cpp_extension(ACTOR_CLIENT, CLIENT_SOURCES, ['-std=c++17']),
    ],
    cmdclass={'build_ext': BuildWithTensorFlow},
)
