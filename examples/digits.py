"""A scikit-learn classifier on its bundled digits, batched: requests that wait together are one call.

    curl localhost:8000/digits/42
    {"sample": 42, "digit": 1, "truth": 1}
"""

import os

import headgate


class Digits:
    """Trained on the first thousand images, asked about any of the 1,797."""

    def __init__(self):
        from sklearn.datasets import load_digits
        from sklearn.svm import SVC

        self.images, self.truth = load_digits(return_X_y=True)
        self.model = SVC(gamma=0.001).fit(self.images[:1000], self.truth[:1000])

    @headgate.accept_batch
    def __call__(self, requests):
        samples = [request.path_params["sample"] for request in requests]
        known = [sample for sample in samples if sample < len(self.images)]
        digits = dict(zip(known, self.model.predict(self.images[known]), strict=True)) if known else {}
        return [self.answer(sample, digits.get(sample)) for sample in samples]

    def answer(self, sample, digit):
        if digit is None:  # fails this request, not the batch
            return LookupError(f"there is no sample {sample}, only 0 to {len(self.images) - 1}")
        return {"sample": sample, "digit": digit, "truth": self.truth[sample]}


client = headgate.start(http_options={"port": int(os.environ.get("PORT", 8000))})
client.create_backend("digits", Digits, config={"max_batch_size": 16, "batch_wait_timeout": 0.002})
client.create_endpoint("digits", backend="digits", route="/digits/{sample:int}")
client.wait()
