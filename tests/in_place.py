"""What stands in for ``uhml.run.background``, whose process takes seconds to start."""

import pickle


class InPlace:
    """A background that does its work in this process, when its result is asked for: no time, no process."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, work):
        self.work = pickle.dumps(work)

    def result(self):
        return pickle.loads(self.work)()
