from tests.unets import no_grad, reference_calls  # noqa: F401 (fixtures of all tests here)
