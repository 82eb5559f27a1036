from tests.unets import no_grad_and_one_thread, reference_calls  # noqa: F401 (fixtures of all tests here)
