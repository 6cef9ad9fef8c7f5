"""Where arrays live and how a step is spread: meshes and rules, pipelines, rematerialisation, offload, processes."""
