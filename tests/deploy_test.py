"""Tests of the files in deploy/, as far as possible without containers and clusters.

network_test.py runs the scripts in deploy/tls.
"""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEPLOY = ROOT / 'deploy'
PORT = 8000
REPLAY_PORT = 9000

# Prints the given flags as experiment.py parses them.
READ_FLAGS = """
import json, sys
import experiment
experiment.FLAGS(sys.argv)
names = ('job_name', 'task', 'learner_address', 'envs_per_actor', 'level_name', 'trusted_network',
         'replay_addresses', 'replay_fraction')
print(json.dumps({name: experiment.FLAGS[name].value for name in names}))
"""


def read_flags(args):
    yaml = pytest.importorskip('yaml')
    result = subprocess.run(
        [sys.executable, '-c', READ_FLAGS, *args], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def load(*names):
    yaml = pytest.importorskip('yaml')
    return [
        document
        for name in names
        for document in yaml.safe_load_all((DEPLOY / name).read_text(encoding='utf-8'))
    ]


def test_only_actors_reach_the_learner_in_compose():
    (compose,) = load('compose.yaml')
    services = compose['services']
    flags = {name: read_flags(service['command']) for name, service in services.items()}
    learner = flags.pop('learner')
    assert (learner['job_name'], learner['task']) == ('learner', 0)
    assert learner['learner_address'] == f'0.0.0.0:{PORT}'
    assert learner['trusted_network']
    assert [each['task'] for each in flags.values()] == list(range(len(flags)))
    for each in flags.values():
        assert each['job_name'] == 'actor'
        assert each['learner_address'] == f'learner:{PORT}'
        assert each['level_name'] == learner['level_name']
    for service in services.values():
        assert 'ports' not in service
        assert 'network_mode' not in service
        (network,) = service['networks']
        assert compose['networks'][network] == {'internal': True}


def test_compose_replay_jobs_match_the_flags_of_the_learner():
    base, replay = (each['services'] for each in load('compose.yaml', 'compose_replay.yaml'))
    learner = replay.pop('learner')
    of_replay = learner['command'][len(base['learner']['command']) :]
    assert learner == {'command': base['learner']['command'] + of_replay}
    flags = read_flags(learner['command'])
    assert flags['replay_fraction'] == 0.5
    addresses = flags['replay_addresses']
    assert addresses == [f'{name}:{REPLAY_PORT}' for name in replay]
    for task, service in enumerate(replay.values()):
        flags = read_flags(service['command'])
        assert (flags['job_name'], flags['task']) == ('replay', task)
        assert flags['replay_addresses'] == addresses
        for name in ('networks', 'security_opt', 'cap_drop', 'image'):
            assert service[name] == base['learner'][name]
        assert 'ports' not in service


def test_kubernetes_replay_jobs_match_the_flags_of_the_learner_and_reach_nobody():
    yaml = pytest.importorskip('yaml')
    (kustomization,) = load('kubernetes-replay/kustomization.yaml')
    (base,) = load('kubernetes/kustomization.yaml')
    assert kustomization['images'] == base['images']
    assert kustomization['resources'][0] == '../kubernetes'
    files = [f'kubernetes-replay/{name}' for name in kustomization['resources'][1:]]
    found = {(each['kind'], each['metadata']['name']): each['spec'] for each in load(*files)}
    learner, *_ = load('kubernetes/learner.yaml')[1:]
    (patch,) = kustomization['patches']
    assert patch['target'] == {'kind': learner['kind'], 'name': learner['metadata']['name']}
    operations = yaml.safe_load(patch['patch'])
    assert {(each['op'], each['path']) for each in operations} == {
        ('add', '/spec/template/spec/containers/0/args/-')
    }
    pod = learner['spec']['template']
    learner_flags = read_flags(
        pod['spec']['containers'][0]['args'] + [each['value'] for each in operations]
    )
    assert learner_flags['replay_fraction'] == 0.5

    jobs = found['StatefulSet', 'impala-replay']
    labels = jobs['template']['metadata']['labels']
    service = found['Service', jobs['serviceName']]
    assert jobs['selector']['matchLabels'] == service['selector'] == labels
    (container,) = jobs['template']['spec']['containers']
    flags = read_flags([each.replace('$(TASK)', '1') for each in container['args']])
    assert (flags['job_name'], flags['task']) == ('replay', 1)
    # A pod of a StatefulSet is NAME-INDEX.SERVICE.
    assert flags['replay_addresses'] == learner_flags['replay_addresses'] == [
        f'impala-replay-{task}.{jobs["serviceName"]}:{REPLAY_PORT}'
        for task in range(jobs['replicas'])
    ]  # fmt: skip
    assert container['ports'] == [{'containerPort': REPLAY_PORT}]

    port = [{'protocol': 'TCP', 'port': REPLAY_PORT}]
    of_replay, of_learner = (found['NetworkPolicy', f'impala-{name}'] for name in
                             ('replay', 'learner-to-replay'))  # fmt: skip
    learner_pods = {'podSelector': {'matchLabels': pod['metadata']['labels']}}
    assert of_replay['podSelector'] == {'matchLabels': labels}
    assert set(of_replay['policyTypes']) == {'Ingress', 'Egress'}
    assert of_replay['ingress'] == [{'from': [learner_pods], 'ports': port}]
    assert of_replay['egress'] == []
    assert of_learner['podSelector'] == learner_pods['podSelector']
    assert of_learner['policyTypes'] == ['Egress']
    assert {'to': [{'podSelector': {'matchLabels': labels}}], 'ports': port} in of_learner['egress']


def test_only_actors_reach_the_learner_in_kubernetes():
    (kustomization,) = load('kubernetes/kustomization.yaml')
    files = {path.name for path in (DEPLOY / 'kubernetes').iterdir()} - {'kustomization.yaml'}
    assert set(kustomization['resources']) == files
    documents = load(*(f'kubernetes/{name}' for name in files))
    found = {(each['kind'], each['metadata']['name']): each['spec'] for each in documents
             if 'spec' in each}  # fmt: skip
    learner, actors = (found['Job', f'impala-{name}'] for name in ('learner', 'actors'))
    pods = [job['template'] for job in (learner, actors)]
    labels = [pod['metadata']['labels'] for pod in pods]
    containers = [pod['spec']['containers'][0] for pod in pods]
    assert found['Service', 'impala-learner']['selector'] == labels[0]

    learner_flags = read_flags(containers[0]['args'])
    actor_flags = read_flags([each.replace('$(JOB_COMPLETION_INDEX)', '7')
                              for each in containers[1]['args']])  # fmt: skip
    assert (learner_flags['job_name'], learner_flags['task']) == ('learner', 0)
    assert (actor_flags['job_name'], actor_flags['task']) == ('actor', 7)
    assert actors['completionMode'] == 'Indexed'
    # From other machines, too.
    assert learner_flags['learner_address'] == f'0.0.0.0:{PORT}'
    assert actor_flags['learner_address'] == f'impala-learner:{PORT}'
    assert actor_flags['level_name'] == learner_flags['level_name']
    (port,) = found['Service', 'impala-learner']['ports']
    assert port['port'] == containers[0]['ports'][0]['containerPort'] == PORT
    assert containers[0]['readinessProbe']['tcpSocket']['port'] == PORT
    assert containers[0]['resources']['limits']['nvidia.com/gpu'] == 1
    claim = pods[0]['spec']['volumes'][0]['persistentVolumeClaim']['claimName']
    assert ('PersistentVolumeClaim', claim) in found

    # A policy that selects a pod forbids all that it does not name.
    of_learner, of_actors = (found['NetworkPolicy', f'impala-{name}'] for name in
                             ('learner', 'actors'))  # fmt: skip
    assert of_learner['podSelector'] == {'matchLabels': labels[0]}
    assert of_learner['ingress'] == [
        {
            'from': [{'podSelector': {'matchLabels': labels[1]}}],
            'ports': [{'protocol': 'TCP', 'port': PORT}],
        }
    ]
    assert of_learner['egress'] == of_actors['ingress'] == []
    assert of_actors['podSelector'] == {'matchLabels': labels[1]}
    for policy in (of_learner, of_actors):
        assert set(policy['policyTypes']) == {'Ingress', 'Egress'}


def test_scripts_parse():
    subprocess.run(['bash', '-n', DEPLOY / 'slurm' / 'impala.sbatch'], check=True)
    for path in (DEPLOY / 'tls').iterdir():
        subprocess.run(['sh', '-n', path], check=True)


def test_slurm_jobs_have_separate_ports_below_the_ephemeral_ones():
    text = (DEPLOY / 'slurm' / 'impala.sbatch').read_text()
    expressions = re.findall(r'=\$\(\((.*SLURM_JOB_ID.*)\)\)', text)
    assert len(expressions) == 2
    for job in (0, 79, 80, 999, 1000, 123456789):
        learner, base = (eval(each, {'SLURM_JOB_ID': job}) for each in expressions)
        assert 1024 < learner < 11000 <= base
        # The tasks of a node have successive ports.
        assert base + 255 < 32768
