"""Several machines: actor jobs, replay jobs and several learners."""
