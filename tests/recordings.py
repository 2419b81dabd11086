"""Small event recordings in the data sets' own formats, by the folders' own generators."""

from conftest import load

write_gesture = load("dvs128-gesture").shapes.make
write_cifar10_dvs = load("cifar10-dvs").shapes.make
