"""Jobs of a study, in this process."""


def execute_here(jobs, *, workers, progress):
    """What `execute` does, without its processes; each study has a test that starts them."""
    todo = [job for job in jobs if not job.finished]
    for job in todo:
        result = job.work(lambda step: False, *job.arguments)
        if job.keep is not None:
            job.keep(result)
    if progress is not None:
        progress(len(todo), len(jobs))
