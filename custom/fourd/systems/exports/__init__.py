"""Writers of the files that `scene-exporter` makes: clips, the page, the animated mesh, poses."""
