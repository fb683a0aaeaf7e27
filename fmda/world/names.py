"""Names of the street world: classes, domains, streets, styles, weathers. No jax."""

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
"""The 19 Cityscapes evaluation classes, in train-id order."""

VOID = 255
"""Label of everything without a class: bins, benches, the bonnet of the own car."""

PALETTE = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
"""The customary colours of the Cityscapes classes, RGB."""

THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
"""Classes whose objects carry an instance id."""

DOMAINS = ("game", "photo", "dusk", "night", "fog", "rain", "snow", "styles")

STREETS = ("city street", "residential street", "crossing", "square", "country road", "highway")

WEATHERS = ("clear", "cloudy", "overcast", "fog", "rain", "snow")

TIMES = ("day", "dusk", "night")

STYLES = (
    "photo",
    "video game",
    "painting",
    "watercolor",
    "drawing",
    "sketch",
    "cartoon",
    "black and white photo",
    "sepia photo",
    "low resolution photo",
    "pixelated photo",
    "blurry photo",
    "jpeg corrupted photo",
    "bad photo",
    "dark photo",
    "bright photo",
    "clay",
    "plastic toy",
    "embroidery",
    "negative",
)
"""What a picture looks like; all but the first two occur only in the domain `styles`."""
