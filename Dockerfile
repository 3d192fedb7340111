# Build:  docker build -t impala .
# Train:  docker run --gpus all -v $PWD/runs:/runs impala --logdir=/runs/pong \
#             --flagfile=configs/atari_paper.flags
#
# DeepMind Lab: put its wheel (deepmind_lab-*.whl, see its own documentation) into the folder
# wheels/ before building to install it.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make libgl1 libglib2.0-0 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /impala
COPY . .
RUN pip install --no-cache-dir 'setuptools>=77' wheel 'tensorflow[and-cuda]==2.21.*' \
    && pip install --no-cache-dir --no-build-isolation -e '.[gpu,vizdoom,minigrid,mujoco,video,dev]' \
    && if ls wheels/*.whl >/dev/null 2>&1; then pip install --no-cache-dir wheels/*.whl; fi

RUN python -m pytest -n 3 --dist loadfile

ENTRYPOINT ["python", "experiment.py"]
