"""Networks of PyTorch for parity tests."""


def shaken(module, seed=0):
    """Moves every parameter and statistic off its initial value, so that no zero or one hides a mistake."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.1 * (noise.abs() if name.endswith("running_var") else noise))
    return module.eval()
