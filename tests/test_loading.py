import contextlib
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from uhml import distributed
from uhml.config import DataConfig
from uhml.data.loading import TrainingBatches, share_loader
from uhml.data.pictures import Pictures
from uhml.data.transforms import plain_transform, reduced, training_transform

N, B, STEPS = 11, 8, range(3, 6)
CONFIG = DataConfig(image_size=16, augment_color=0.4)
NEUTRAL = (0.0,) * 3, (1.0,) * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures of noise, each of another size."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(random.integers(0, 256, (20 + i, 31 - i, 3), dtype=np.uint8)).save(root / f"{i:02d}.png")
    return root


def pictures_of(folder):
    return Pictures(paths=tuple(str(path) for path in sorted(folder.iterdir())))


def batch_of_step(step):
    return np.random.default_rng(step).permutation(N)[: B // 2]


def _batches(folder, num_workers, seed=0, num_views=2):
    transform = training_transform(CONFIG, *NEUTRAL)
    return contextlib.closing(
        TrainingBatches(pictures_of(folder), transform, num_views=num_views, seed=seed, num_workers=num_workers)
    )


def _training(folder, num_workers, seed=0, steps=STEPS, num_views=2):
    torch.manual_seed(distributed.rank())  # the state of the global generator is nobody's seed
    with _batches(folder, num_workers, seed, num_views) as batches:
        images, pictures = zip(*batches.of_steps(steps, batch_of_step), strict=True)
    assert len(images) == len(steps)
    return torch.stack(images), torch.stack(pictures)


def _untouched(folder, num_workers):
    before = torch.get_rng_state()
    for _ in share_loader(pictures_of(folder), plain_transform(CONFIG, *NEUTRAL), 4, num_workers):
        pass
    with _batches(folder, num_workers) as batches:
        for _ in batches.of_steps(STEPS, batch_of_step):
            pass
    return torch.equal(before, torch.get_rng_state())


@pytest.mark.ddp
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_the_ranks_batches_together_are_the_batch_of_one_process(folder, world_size, num_workers):
    images, pictures = _training(folder, 0)
    assert images.shape == (len(STEPS), B, 3, 16, 16)
    for step, batch in zip(STEPS, pictures, strict=True):
        assert batch.tolist() == np.repeat(batch_of_step(step), 2).tolist()
    by_rank = run_ranks(_training, world_size, folder, num_workers)
    assert torch.equal(torch.cat([part for part, _ in by_rank], 1), images)
    assert torch.equal(torch.cat([part for _, part in by_rank], 1), pictures)


def test_views_differ_between_rows_steps_and_seeds(folder):
    images, pictures = _training(folder, 0)
    assert not torch.equal(images[:, 0::2], images[:, 1::2])
    assert len({row.numpy().tobytes() for row in images.flatten(0, 1)}) == len(STEPS) * B
    other, same_pictures = _training(folder, 0, seed=1)
    assert torch.equal(pictures, same_pictures)
    assert all(not torch.equal(a, b) for a, b in zip(images.flatten(0, 1), other.flatten(0, 1), strict=True))


def test_a_step_does_not_depend_on_those_before_it(folder):
    images, pictures = _training(folder, 0)
    later, later_pictures = _training(folder, 0, steps=STEPS[2:])
    assert torch.equal(later[0], images[2])
    assert torch.equal(later_pictures[0], pictures[2])


def test_one_view_is_each_picture_once(folder):
    images, pictures = _training(folder, 0, num_views=1)
    assert images.shape[:2] == pictures.shape == (len(STEPS), B // 2)
    assert pictures[0].tolist() == batch_of_step(STEPS[0]).tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_leave_the_global_generator_alone(folder, num_workers):
    assert _untouched(folder, num_workers)


def test_the_workers_go_on_with_other_clusters(folder):
    def others(step):
        return batch_of_step(step)[::-1]

    others_before = set(multiprocessing.active_children())
    with _batches(folder, 2) as batches:
        first = list(batches.of_steps(STEPS, batch_of_step))
        workers = set(multiprocessing.active_children()) - others_before
        assert len(workers) == 2
        # The same steps once more, as a loader of its own makes them.
        again = list(batches.of_steps(STEPS, others))
        assert set(multiprocessing.active_children()) - others_before == workers
    assert set(multiprocessing.active_children()) - others_before == set()
    with _batches(folder, 0) as batches:
        for made, chosen in ((first, batch_of_step), (again, others)):
            for (images, pictures), (same_images, same_pictures) in zip(
                made, batches.of_steps(STEPS, chosen), strict=True
            ):
                assert torch.equal(images, same_images)
                assert torch.equal(pictures, same_pictures)
    assert not torch.equal(first[0][1], again[0][1])


def _share(folder, num_pictures, batch_size, num_workers):
    pictures = pictures_of(folder).select(range(num_pictures))
    loader = share_loader(pictures, plain_transform(CONFIG, *NEUTRAL), batch_size, num_workers)
    batches = list(loader)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    rows = torch.cat(batches) if batches else torch.zeros(0, 3, 16, 16)
    return distributed.all_gather_shares(rows, num_pictures)


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("world_size", "num_pictures", "num_workers"), [(1, 11, 0), (2, 11, 0), (4, 11, 0), (4, 3, 0), (2, 1, 1)]
)
def test_shares_cover_each_picture_once_in_order(folder, world_size, num_pictures, num_workers):
    transform = plain_transform(CONFIG, *NEUTRAL)
    expected = torch.stack([transform(Image.open(path)) for path in pictures_of(folder).paths])
    for rows in run_ranks(_share, world_size, folder, num_pictures, 2, num_workers):
        assert torch.equal(rows, expected[:num_pictures])


def test_the_plain_transform_squashes_or_crops_the_centre():
    # Left third red, middle green, right third blue.
    stripes = np.zeros((30, 90, 3), np.uint8)
    for i in range(3):
        stripes[:, 30 * i : 30 * (i + 1), i] = 255
    image = Image.fromarray(stripes)
    squashed = plain_transform(DataConfig(image_size=30, fit="squash"), *NEUTRAL)(image)
    assert squashed.shape == (3, 30, 30)
    assert squashed[:, 15, [3, 15, 27]].argmax(0).tolist() == [0, 1, 2]
    cropped = plain_transform(DataConfig(image_size=20, center_crop=20 / 30), *NEUTRAL)(image)
    assert cropped.shape == (3, 20, 20)
    assert (cropped.argmax(0) == 1).all()
    # The crop keeps its share of the shorter side, here all of it.
    whole = plain_transform(DataConfig(image_size=30, center_crop=1.0), *NEUTRAL)(image)
    torch.testing.assert_close(whole[1], torch.ones(30, 30))


@pytest.mark.parametrize("make", [plain_transform, training_transform])
def test_pixels_are_normalised_by_mean_and_std(make):
    image = Image.new("RGB", (40, 40), (255, 51, 0))
    pixels = make(DataConfig(image_size=16), (0.5, 0.2, 0.1), (0.5, 0.1, 0.2))(image)
    assert pixels.dtype == torch.float32
    expected = torch.tensor([1.0, 0.0, -0.5])[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("fit", "narrowed"), [("squash", 4.0), ("crop", 1.0)])
def test_crops_have_the_proportions_of_the_plain_picture(fit, narrowed):
    # A wide picture of stripes: their width against that of bars tells how it is squeezed.
    y, x = np.mgrid[:64, :256]
    image = Image.fromarray(np.stack([255 * (x // 8 % 2), 255 * (y // 8 % 2), 0 * x], 2).astype(np.uint8))
    config = DataConfig(image_size=64, fit=fit, augment_scale=(0.1, 0.1), augment_ratio=(1, 1), augment_flip=False)

    def squeezed(transform):
        pixels = transform(image)
        across = (pixels[0, :, 1:] - pixels[0, :, :-1]).abs().sum() / 64
        down = (pixels[1, 1:] - pixels[1, :-1]).abs().sum() / 64
        return float(across / down)

    plain = squeezed(plain_transform(config, *NEUTRAL))
    torch.manual_seed(0)
    crops = [squeezed(training_transform(config, *NEUTRAL)) for _ in range(20)]
    assert plain == pytest.approx(narrowed, rel=0.2)
    assert np.mean(crops) == pytest.approx(narrowed, rel=0.2)


def test_some_pictures_lose_their_colours():
    torch.manual_seed(0)
    image = Image.fromarray(np.full((16, 16, 3), (200, 100, 0), np.uint8))
    transform = training_transform(DataConfig(image_size=16, augment_gray=0.25), *NEUTRAL)
    seen = torch.stack([transform(image) for _ in range(80)])
    grey = (seen[:, 0] == seen[:, 1]).all((1, 2))
    assert 8 <= grey.sum() <= 32
    assert (seen[~grey] == seen[~grey][0]).all()


@pytest.mark.parametrize(
    ("size", "smaller"), [((20, 50), (20, 50)), ((24, 50), (24, 50)), ((48, 96), (24, 48)), ((96, 48), (48, 24))]
)
def test_only_pictures_whose_shorter_side_is_longer_are_reduced(size, smaller):
    assert reduced(Image.new("RGB", size), 24).size == smaller
    assert reduced(Image.new("RGB", size), None).size == size


def test_a_crop_of_all_of_a_picture_is_the_plain_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    whole = {"augment_scale": (1.0, 1.0), "augment_ratio": (1.0, 1.0), "augment_flip": False}
    config = DataConfig(image_size=16, fit="squash", **whole)
    assert torch.equal(training_transform(config, *NEUTRAL)(image), plain_transform(config, *NEUTRAL)(image))


def test_colours_may_change_more_than_hues_can():
    image = Image.fromarray(np.full((16, 16, 3), (200, 100, 0), np.uint8))
    assert training_transform(DataConfig(image_size=16, augment_color=4.0), *NEUTRAL)(image).isfinite().all()


def test_augmentation_follows_the_config():
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    image = Image.fromarray(half)

    def seen(**options):
        torch.manual_seed(0)
        transform = training_transform(DataConfig(image_size=16, **options), *NEUTRAL)
        return torch.stack([transform(image) for _ in range(40)])

    whole = {"augment_scale": (1.0, 1.0), "augment_ratio": (1.0, 1.0)}
    plain = seen(**whole, augment_flip=False)
    assert (plain == plain[0]).all()
    flipped = seen(**whole)
    assert 5 < (flipped[:, 0, 8, 0] > flipped[:, 0, 8, -1]).sum() < 35
    assert torch.equal(flipped[flipped[:, 0, 8, 0] < flipped[:, 0, 8, -1]][0], plain[0])
    assert len(seen(augment_scale=(0.2, 0.4), augment_flip=False).flatten(1).unique(dim=0)) > 10
    colours = seen(**whole, augment_flip=False, augment_color=0.4)
    assert len(colours.flatten(1).unique(dim=0)) > 20
