"""Every kernel once on a few pixels, for compute-sanitizer: python tests/gpu_small_case.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


from bench.calls import Call
from bench.gpu_sections import op
from bench.gpu_timing import Device
from fasternet_kernels import cuda, triton


def main(dry: bool = False) -> None:
    device = Device(dry)
    for names in triton.FAMILIES.values():
        for name in names:
            stage, side = (1, 4) if dry else (3, 5)
            call = Call(name, "t0", stage, 2, "fp16", side=side)
            try:
                args = call.arguments(device.kind)
            except ValueError:  # an op without a call of its own: on packs
                continue
            if not (dry and name == "head"):  # 1000 classes
                op(device, name)(*args)
    if not dry and not cuda.unavailable():
        x, weight = Call("pconv3x3_", "t0", 1, 3, "fp16", side=13).arguments(device.kind)
        assert cuda.pconv3x3_(x, weight)
    device.synchronize()


if __name__ == "__main__":
    main()
    print("done")
